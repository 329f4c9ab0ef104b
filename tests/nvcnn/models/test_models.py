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


@pytest.mark.parametrize(
    ("name", "rate"),
    [("trivial", 0.001), ("lenet", 0.001), ("resnet18", 0.5), ("resnet34", 2.0), ("resnet50", 2.0), ("resnext50", 0.1)],
)
def test_learning_rate_at_a_total_batch_of_2048(name, rate):
    assert MODELS[name].learning_rate(2048) == rate


def test_unknown_model():
    with pytest.raises(
        InputError, match=r"--model=resnet49: unknown, choose one of trivial, lenet, alexnet, .*resnext152"
    ):
        build_model("resnet49", num_classes=10, seed=1)


@pytest.mark.parametrize("name", ["lenet", "resnet34"])
def test_v1_is_for_bottlenecks(name):
    bottlenecks = "resnet50, resnet101, resnet152, resnext50, resnext101, resnext152"
    with pytest.raises(InputError, match=f"--resnet_v1 is for {bottlenecks}; --model={name} has no"):
        build_model(name, num_classes=10, resnet_v1=True, seed=1)


@pytest.mark.parametrize("name", ["lenet", "trivial"])
def test_models_of_one_size_say_so(name):
    size = MODELS[name].image_size
    with pytest.raises(InputError, match=f"--model={name} takes images of 3 x {size} x {size}"):
        build_model(name, num_classes=10, seed=1)(torch.zeros(1, 3, 32, 32))
