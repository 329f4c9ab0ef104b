"""The table of models, and what holds for every model in it."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvcnn.models import MODELS, build_model
from nvcnn.models.layers import cast_matrices
from nvcnn.program import InputError


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("trivial", 3 * 224 * 224 + 1 + 2 * 1000),
        ("lenet", 32 * (75 + 1) + 64 * (800 + 1) + 512 * (3136 + 1) + 1000 * (512 + 1)),
    ],
)
def test_number_of_parameters(name, count):
    """The sums of the layers; the ResNets' parameters are torchvision's, one by one, in test_resnet.py."""
    with torch.device("meta"):
        model = build_model(name, num_classes=1000, seed=1)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("name", MODELS)
def test_takes_images_in_the_compute_dtype_and_returns_fp32_logits(name):
    with torch.device("meta"):
        model = cast_matrices(build_model(name, num_classes=7, seed=1), torch.float16)
        size = MODELS[name].image_size
        logits = model(torch.empty(2, 3, size, size, dtype=torch.float16).to(memory_format=torch.channels_last))
    assert logits.shape == (2, 7)
    assert logits.dtype == torch.float32


class Layouts(TorchDispatchMode):
    """Collects the operators, forward and backward, that change the layout of an activation or copy one."""

    def __init__(self):
        super().__init__()
        self.seen, self.changed = 0, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        images = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.dim() == 4 and not op.is_view]
        self.seen += len(images)
        copies = op.overloadpacket.__name__ in ("clone", "copy_", "_to_copy")
        if any(copies or not t.is_contiguous(memory_format=torch.channels_last) for t in images):
            self.changed.append(op)
        return result


@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [("lenet", 28, torch.float16), ("resnet18", 32, torch.float32), ("resnet50", 32, torch.bfloat16)],
)
def test_everything_stays_channels_last(device, name, size, dtype):
    model = cast_matrices(build_model(name, num_classes=10, seed=1).to(device), dtype)
    x = torch.randn(2, 3, size, size).to(device, dtype).to(memory_format=torch.channels_last)
    with Layouts() as layouts:
        model(x).sum().backward()
    assert layouts.seen > 0
    assert layouts.changed == []


def test_one_seed_one_set_of_weights():
    one = build_model("lenet", num_classes=10, seed=1)
    torch.randn(100)
    again, other = build_model("lenet", num_classes=10, seed=1), build_model("lenet", num_classes=10, seed=2)
    for key, value in one.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
        assert not torch.equal(other.state_dict()[key], value), key


def test_building_draws_nothing_from_the_global_generator():
    state = torch.get_rng_state()
    build_model("lenet", num_classes=10, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_lenet_learns_one_batch(device, dtype):
    model = cast_matrices(build_model("lenet", num_classes=10, seed=1).to(device), dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 28, 28, generator=generator).to(device, dtype).to(memory_format=torch.channels_last)
    labels = torch.arange(8, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_sizes_and_learning_rates_are_the_original_s_but_for_two_rates():
    """The rates are those of a total batch of 2048. docs/models.md says why lenet's and resnet18's are others."""
    sizes = dict.fromkeys(MODELS, 224) | {"lenet": 28, "alexnet": 227, "overfeat": 231}
    sizes |= dict.fromkeys(("inception3", "inception4", "inception-resnet2"), 299)
    rates = dict.fromkeys(("trivial", "overfeat"), 0.001) | {"lenet": 0.05, "alexnet": 0.03, "googlenet": 0.04}
    rates |= dict.fromkeys(("vgg11", "vgg13", "vgg16", "vgg19"), 0.02) | {"inception3": 0.2}
    rates |= dict.fromkeys(("inception4", "inception-resnet2"), 0.045)
    rates |= dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"), 2.0)
    rates |= dict.fromkeys(("resnext50", "resnext101", "resnext152"), 0.1)
    assert {name: model.image_size for name, model in MODELS.items()} == sizes
    assert {name: model.learning_rate(2048) for name, model in MODELS.items()} == rates


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.least_size])
def test_takes_the_least_size_that_it_says(name):
    """In training, whose BatchNorms want more than one value a channel, and where memory is counted."""
    size = MODELS[name].least_size
    with torch.device("meta"):
        logits = build_model(name, num_classes=7, seed=1)(torch.empty(2, 3, size, size))
    assert logits.shape == (2, 7)


def test_epsilon_is_the_original_s_unless_given():
    with torch.device("meta"):
        models = [build_model("googlenet", num_classes=7, seed=1, **given) for given in ({}, {"epsilon": 1e-3})]
    found = [{m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} for model in models]
    assert found == [{1e-4}, {1e-3}]


@pytest.mark.parametrize("name", ["googlenet", "inception3"])
def test_heads_are_asked_for(name):
    with torch.device("meta"):
        plain, headed = (build_model(name, num_classes=7, seed=1, aux=aux) for aux in (False, True))
        x = torch.empty(2, 3, 299, 299)
        assert isinstance(plain(x), Tensor)
        assert [y.shape for y in headed(x)] == [(2, 7)] * {"googlenet": 3, "inception3": 2}[name]
        assert isinstance(headed.eval()(x), Tensor)
    assert headed.aux_weight == {"googlenet": 0.3, "inception3": 0.4}[name]
    with pytest.raises(InputError, match="--aux is for googlenet, inception3; --model=resnet50 has no auxiliary heads"):
        build_model("resnet50", num_classes=7, seed=1, aux=True)


def test_the_head_of_inception3_needs_its_size():
    with torch.device("meta"), pytest.raises(InputError, match="images of 299 and more"):
        build_model("inception3", num_classes=7, seed=1, aux=True)(torch.empty(2, 3, 200, 200))


def test_unknown_model():
    with pytest.raises(
        InputError,
        match=r"--model=resnet49: unknown, did you mean resnet34 or .*\? All are trivial, lenet, .*resnext152",
    ):
        build_model("resnet49", num_classes=10, seed=1)


@pytest.mark.parametrize("name", ["lenet", "resnet34"])
def test_v1_is_for_bottlenecks(name):
    bottlenecks = "resnet50, resnet101, resnet152, resnext50, resnext101, resnext152"
    with pytest.raises(InputError, match=f"--resnet_v1 is for {bottlenecks}; --model={name} has no"):
        build_model(name, num_classes=10, resnet_v1=True, seed=1)


@pytest.mark.parametrize("name", ["lenet", "trivial", "overfeat"])
def test_models_of_one_size_say_so(name):
    size = MODELS[name].image_size
    message = f"--model={name} takes images of 3 x {size} x {size}"
    with torch.device("meta"), pytest.raises(InputError, match=message):
        build_model(name, num_classes=10, seed=1)(torch.zeros(1, 3, 32, 32))
