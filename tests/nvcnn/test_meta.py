"""What is found without memory is compared with real passes on the CPU, and with sums by hand."""

import pytest
import torch

from nvcnn.meta import GRAM_ADDS, GRAM_ALONE, activation_bytes, gradient_order, macs, places
from nvcnn.models import build_model
from nvcnn.models.layers import cast_matrices

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])


@dtypes
def test_lenet_by_hand(dtype):
    values = 3 * 28 * 28 + 32 * 28 * 28 + 32 * 14 * 14 + 64 * 14 * 14 + 64 * 7 * 7 + 512
    places = 32 * 14 * 14 + 64 * 7 * 7  # of maxima in their windows, a byte each
    expected = 5 * (values * dtype.itemsize + places)
    assert activation_bytes(build_model("lenet", num_classes=10, seed=1), 5, 28, dtype) == expected


# Published: torchvision's tables of its weights, "GFLOPS".
@pytest.mark.parametrize(("name", "published"), [("resnet50", 4.09), ("resnext50", 4.23), ("vgg16", 15.47)])
def test_macs_are_the_published_ones(name, published):
    with torch.device("meta"):
        model = build_model(name, num_classes=1000, seed=1).eval()
    assert macs(model, 224) / 1e9 == pytest.approx(published, abs=0.005)


def kept(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Returns the bytes that a forward keeps beyond model and logits, images included, as the graph itself has them."""
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages, todo, visited = {}, [model(x).grad_fn], set()
    while todo:
        node = todo.pop()
        if node in visited:
            continue
        visited.add(node)
        todo += [n for n, _ in node.next_functions if n is not None]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for t in (*saved, *getattr(node, "saved_tensors", ())):  # of PyTorch's own operators, and of custom ones
            if isinstance(t, torch.Tensor):
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage()
    return sum(s.nbytes() for pointer, s in storages.items() if pointer not in known)


@pytest.mark.parametrize(("name", "dtype"), [("resnet18", torch.float32), ("resnet50", torch.bfloat16)])
def test_is_what_autograd_keeps_on_the_cpu(monkeypatch, name, dtype):
    monkeypatch.setenv("NVCNN_KERNELS", "reference")  # as tensors on the CPU have it
    model = build_model(name, num_classes=10, seed=1)
    estimate = activation_bytes(model, 2, 64, dtype)
    x = torch.randn(2, 3, 64, 64).to(dtype).to(memory_format=torch.channels_last)
    assert estimate == kept(cast_matrices(model, dtype), x)


def test_leaves_the_model_alone():
    model = build_model("resnet18", num_classes=10, seed=1)
    before = {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}
    activation_bytes(model, 4, 64, torch.float16)
    for key, value in (*model.named_parameters(), *model.named_buffers()):
        assert value.dtype == before[key].dtype, key
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["lenet", "resnet18", "resnet50"])
def test_order_is_that_of_a_real_backward(name):
    model = build_model(name, num_classes=10, seed=1)
    size = 28 if name == "lenet" else 32
    predicted = gradient_order(model, 28 if name == "lenet" else 224)
    seen = []
    for parameter_name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=parameter_name: seen.append(name))
    model(torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)).sum().backward()
    assert seen == predicted


def test_order_leaves_the_model_alone():
    model = build_model("resnet18", num_classes=10, seed=1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gradient_order(model, 224)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())


def resnet50():
    with torch.device("meta"):
        return build_model("resnet50", num_classes=10, seed=1)


def test_the_places_of_a_resnet50():
    model = resnet50()
    found = places(model, 256, 224, torch.float16)
    assert list(found) == [name for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(found) == 53
    assert len(set(found.values())) == 28
    stem, strided, joined = found["conv1"], found["layer2.0.conv2"], found["layer3.1.conv1"]
    assert str(stem) == (
        "x 256x3x224x224 weight 64x3x7x7 stride 2x2 padding 3x3 groups 1 float16 activation, without its gradient"
    )
    assert str(strided) == "x 256x128x56x56 weight 128x128x3x3 stride 2x2 padding 1x1 groups 1 float16 raw"
    assert joined.reads == "join of two"  # behind the block whose skip connection is a convolution
    assert found["layer3.2.conv1"].reads == "join"
    assert found["layer3.0.downsample.0"].reads == "activation"
    first = {name: place.skip_stride for name, place in found.items() if ".0.conv1" in name}
    assert first == {f"layer{stage}.0.conv1": 1 if stage == 1 else 2 for stage in (1, 2, 3, 4)}
    assert all(place.stride == (1, 1) for name, place in found.items() if "downsample" in name)
    assert {m.algorithm for m in model.modules() if isinstance(m, torch.nn.Conv2d)} == {"torch"}  # as it was
    padded = places(model, 256, 224, torch.float16, channels=4)
    assert list(padded) == list(found)
    assert padded["conv1"].weight == (64, 4, 7, 7)


def test_the_places_of_a_resnet50_with_gram_matrices():
    """What a 1 x 1 that widens hands on is read as rectified, once; for the skip connection it is an activation."""
    model = resnet50()
    before, found = (places(model, 256, 224, torch.float16, gram=gram) for gram in (False, True))
    assert found.keys() == before.keys()
    changed = {name: place for name, place in found.items() if place != before[name]}
    widening = {name for name in found if name.endswith(("conv3", "downsample.0"))}
    assert {name for name, place in changed.items() if place.gram} == widening
    assert {name for name, place in changed.items() if not place.gram} == {
        name for name in found if name.endswith(".conv1") and name != "layer1.0.conv1"
    }
    assert {place.reads for place in changed.values() if not place.gram} == {"rectified"}
    assert {(found[name].gram, found[name].reads) for name in widening if "conv3" in name} == {(GRAM_ADDS, "raw")}
    skips = {(found[name].gram, found[name].reads) for name in widening if "conv3" not in name}
    assert skips == {(GRAM_ALONE, "activation")}
    assert all(place.gradient for place in changed.values())
    assert str(found["layer2.0.downsample.0"]) == (
        "x 256x256x28x28 weight 512x256x1x1 stride 1x1 padding 0x0 groups 1 float16 activation gram"
    )


def test_the_places_of_an_evaluation():
    model = resnet50().eval()
    found = places(model, 64, 224, torch.float16, channels=4)
    assert len(found) == 53
    assert str(found["conv1"]) == (
        "x 64x4x224x224 weight 64x4x7x7 stride 2x2 padding 3x3 groups 1 float16 activation, folded"
    )
    assert {place.folded for name, place in found.items() if name.endswith("conv3")} == {"folded, adding"}
    assert {place.folded for name, place in found.items() if not name.endswith("conv3")} == {"folded"}
    assert not any(place.gradient for place in found.values())


def test_the_places_of_a_vgg16():
    """A convolution behind another masks that one's gradient; behind a pooling there is an ordinary tensor."""
    with torch.device("meta"):
        model = build_model("vgg16", num_classes=10, seed=1)
    found = places(model, 64, 224, torch.float16, channels=4)
    assert len(found) == 13
    assert all(place.bias and not place.folded for place in found.values())
    reads = {"0": "activation", "5": "activation", "10": "activation", "17": "activation", "24": "activation"}
    assert {name: place.reads for name, place in found.items()} == {
        name: reads.get(name.removeprefix("features."), "rectified") for name in found
    }
    assert [name for name, place in found.items() if not place.gradient] == ["features.0"]
    assert str(found["features.2"]).endswith("groups 1 float16 rectified bias")
    evaluated = places(model.eval(), 64, 224, torch.float16, channels=4)
    assert {(place.reads, place.bias, place.folded) for place in evaluated.values()} == {("activation", True, "folded")}


def test_a_model_without_blocks_has_no_places():
    with torch.device("meta"):
        model = build_model("trivial", num_classes=10, seed=1)
    assert places(model, 2, 224, torch.float32) == {}
