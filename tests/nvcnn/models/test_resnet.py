"""The ResNets against torchvision's: names, architecture, initialisation, outputs, gradients, statistics."""

from copy import deepcopy
from functools import partial
from itertools import cycle

import pytest
import torch
import torchvision
from torch import Tensor, nn

from nvcnn.models import ALGORITHMS, build_model, resnet
from nvcnn.models.layers import BatchNorm2d, Conv2d, cast_matrices
from nvcnn.models.resnet import ResNet

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50", "resnext101", "resnext152"]
# torchvision's, with our epsilon, and a momentum of 1: its running statistics are those of one batch.
NORM = partial(nn.BatchNorm2d, eps=1e-4, momentum=1.0)


def peer(name: str, seed: int, **options: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        groups = {"groups": 32, "width_per_group": 4} if "x" in name else {}
        return getattr(torchvision.models, name.replace("x", ""))(norm_layer=NORM, **groups, **options)


def shallow(block: str, dtype: torch.dtype, **options: int) -> tuple[ResNet, nn.Module]:
    """Returns our net of five blocks, one without a downsample, and torchvision's in `dtype`. Weights are equal."""
    torch.manual_seed(0)
    depths, of_peer = [2, 1, 1, 1], {name.replace("group_width", "width_per_group"): n for name, n in options.items()}
    theirs = torchvision.models.ResNet(
        getattr(torchvision.models.resnet, block), depths, num_classes=10, norm_layer=NORM, **of_peer
    ).to(dtype)
    ours = ResNet(getattr(resnet, block), depths, num_classes=10, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def images(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=generator)
    return x.to(dtype).to(memory_format=torch.channels_last)


def choose(model: nn.Module, algorithm: str) -> nn.Module:
    """Has `algorithm` compute every convolution, or, "mixed", all of them in turn."""
    order = "001020304051121314152232425334354455"  # every two are neighbours, in either order, and each is its own
    convolutions = [m for m in model.modules() if isinstance(m, Conv2d)]
    for module, i in zip(convolutions, cycle(order), strict=False):
        module.algorithm = ALGORITHMS[int(i)] if algorithm == "mixed" else algorithm
    return model


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("name", NAMES)
def test_names_shapes_and_dtypes_are_torchvision_s(name):
    with torch.device("meta"):
        ours, theirs = build_model(name, num_classes=1000, seed=1).state_dict(), peer(name, seed=1).state_dict()
    assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [(k, v.shape, v.dtype) for k, v in theirs.items()]


@pytest.mark.parametrize("zero_gamma", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnext50"])
def test_initialisation_is_torchvision_s(name, zero_gamma):
    """One seed gives the same bits, not only the same distribution."""
    ours = build_model(name, num_classes=1000, seed=7, zero_gamma=zero_gamma)
    theirs = peer(name, seed=7, zero_init_residual=zero_gamma)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("block", "options", "algorithm"),
    [
        *(("BasicBlock", {}, algorithm) for algorithm in [*ALGORITHMS, "mixed"]),
        *(("Bottleneck", {}, algorithm) for algorithm in ["triton", "triton-gram", "cudnn-gram", "mixed"]),
        ("Bottleneck", {"groups": 32, "group_width": 4}, "mixed"),
    ],
)
def test_computes_what_torchvision_computes(block, options, training, algorithm):
    """Output and every gradient are compared in float64, where rounding cannot hide a difference."""
    ours, theirs = (net.double().train(training) for net in shallow(block, torch.float64, **options))
    choose(ours, algorithm).to(memory_format=torch.channels_last)
    x = images(torch.float64)
    actual, expected = ours(x), theirs(x)
    assert relative_error(actual, expected) < 1e-12
    direction = torch.randn_like(expected)
    actual.backward(direction)
    expected.backward(direction)
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) < 1e-9, key
    if not training:
        with torch.no_grad():
            assert relative_error(ours(x), expected) < 1e-12
    if training:
        for key, norm in ours.named_modules():
            if isinstance(norm, BatchNorm2d):
                one_batch = theirs.get_submodule(key)
                torch.testing.assert_close(norm.batch_mean, one_batch.running_mean)
                torch.testing.assert_close(norm.batch_var, one_batch.running_var)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_gamma_of_zero_has_a_gradient(algorithm):
    """All that is behind it has none yet."""
    ours, theirs = (net.double() for net in shallow("Bottleneck", torch.float64))
    for net in (ours, theirs):
        for i in (1, 2, 3, 4):
            nn.init.zeros_(net.get_submodule(f"layer{i}.0.bn3").weight)
    choose(ours, algorithm).to(memory_format=torch.channels_last)
    x, direction = images(torch.float64), torch.randn(4, 10, dtype=torch.float64)
    for net in (ours, theirs):
        net(x).backward(direction)
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9 * direction.norm().item(), msg=key)
    assert ours.layer1[0].bn3.weight.grad.all()
    assert not ours.layer1[0].conv3.weight.grad.any()


@pytest.mark.parametrize(
    ("block", "dtype", "algorithm"),
    [
        *(("Bottleneck", torch.float16, algorithm) for algorithm in ALGORITHMS),
        *(("Bottleneck", dtype, "mixed") for dtype in (torch.float32, torch.bfloat16)),
        ("BasicBlock", torch.bfloat16, "mixed"),
    ],
)
def test_rounds_no_more_than_torchvision(device, block, dtype, algorithm):
    """Ours has matrices in `dtype` and vectors in fp32, torchvision's has all in `dtype`; the measure is float64.

    How a CPU sums in halves decides which of torchvision's gradients happen to be good: theirs count as no better than
    they are by root mean square over the parameters.
    """
    ours, theirs = (net.to(device) for net in shallow(block, dtype))
    exact = deepcopy(theirs).double()
    cast_matrices(choose(ours, algorithm), dtype)

    x, direction = images(dtype).to(device), torch.randn(4, 10).to(device, dtype)
    outputs = [model(x.to(model.conv1.weight.dtype)) for model in (ours, theirs, exact)]
    for output in outputs:
        output.backward(direction.to(output.dtype))
    assert outputs[0].dtype == torch.float32
    assert relative_error(outputs[0], outputs[2]) <= 2 * relative_error(outputs[1], outputs[2])
    errors = []
    for (key, p), q, r in zip(ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == (dtype if p.dim() >= 2 else torch.float32), key
        errors.append((relative_error(p.grad, r.grad), relative_error(q.grad, r.grad)))
    usual = sum(theirs_error**2 for _, theirs_error in errors) ** 0.5 / len(errors) ** 0.5
    for (key, _), (error, theirs_error) in zip(ours.named_parameters(), errors, strict=True):
        assert error <= 2 * max(theirs_error, usual), key


def strides(model: nn.Module) -> list[tuple[int, int, int]]:
    """Returns those of the three convolutions in the first block of each stage."""
    stages = [model.get_submodule(f"layer{i}") for i in (1, 2, 3, 4)]
    return [(stage[0].conv1.stride[0], stage[0].conv2.stride[0], stage[0].conv3.stride[0]) for stage in stages]


def test_v1_has_the_stride_in_the_first_1x1():
    with torch.device("meta"):
        v1 = build_model("resnet50", num_classes=10, resnet_v1=True, seed=1)
        v15 = build_model("resnet50", num_classes=10, seed=1)
    assert strides(v1) == [(1, 1, 1)] + 3 * [(2, 1, 1)]
    assert strides(v15) == [(1, 1, 1)] + 3 * [(1, 2, 1)]
    assert [p.shape for p in v1.parameters()] == [p.shape for p in v15.parameters()]
    assert v1(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 10)
