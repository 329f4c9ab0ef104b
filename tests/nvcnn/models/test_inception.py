"""GoogLeNet and the Inceptions against torchvision's and timm's: names, initialisation, outputs, gradients, memory."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import cycle
from typing import NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from nvcnn.meta import activation_bytes
from nvcnn.models import ALGORITHMS, inception3
from nvcnn.models.googlenet import GoogLeNet
from nvcnn.models.inception3 import Inception3
from nvcnn.models.inception4 import Inception4
from nvcnn.models.inception_resnet2 import InceptionResNet2
from nvcnn.models.layers import BatchNorm2d, Conv2d


class Pair(NamedTuple):
    """How to build our model and its peer, and the size of small images."""

    ours: Callable[..., nn.Module]
    theirs: Callable[..., nn.Module]
    size: int


def torchvision_s(name: str) -> Callable[..., nn.Module]:
    def build(*, num_classes: int, aux: bool = False) -> nn.Module:
        options = {"aux_logits": aux, "init_weights": True, "transform_input": False}
        return getattr(torchvision.models, name)(num_classes=num_classes, **options)

    return build


PAIRS = {
    "googlenet": Pair(GoogLeNet, torchvision_s("googlenet"), 64),
    "inception3": Pair(Inception3, torchvision_s("inception_v3"), 75),
    "inception4": Pair(Inception4, partial(timm.create_model, "inception_v4"), 75),
    "inception_resnet2": Pair(InceptionResNet2, partial(timm.create_model, "inception_resnet_v2"), 75),
}
HEADS = {"googlenet": ["aux1", "aux2"], "inception3": ["AuxLogits"]}
ALL = [*((name, {}) for name in PAIRS), *((name, {"aux": True}) for name in HEADS)]


def alike(ours: nn.Module, theirs: nn.Module, training: bool) -> tuple[nn.Module, nn.Module]:
    """Returns both with the same random state, in float64 and without dropout.

    The peer has our epsilon, and a momentum of 1: its running statistics are those of one batch.
    """
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-4, 1.0
            for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.running_mean, -0.5)):
                nn.init.uniform_(tensor, low, low + 1)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for module in ours.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    ours.load_state_dict(theirs.state_dict())
    return ours.double().train(training).to(memory_format=torch.channels_last), theirs.double().train(training)


def pair(name: str, training: bool, **options: bool) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return alike(*(build(num_classes=10, **options) for build in PAIRS[name][:2]), training)


def choose(model: nn.Module, algorithm: str) -> None:
    """Has `algorithm` compute every convolution, or, "mixed", all of them in turn."""
    order = "001020304051121314152232425334354455"  # every two are neighbours, in either order, and each is its own
    convolutions = [m for m in model.modules() if isinstance(m, Conv2d)]
    for module, i in zip(convolutions, cycle(order), strict=False):
        module.algorithm = ALGORITHMS[int(i)] if algorithm == "mixed" else algorithm


def images(size: int) -> Tensor:
    """Returns eight: the last layers have one pixel an image, and BatchNorm of three such values magnifies rounding."""
    return torch.randn(8, 3, size, size, dtype=torch.float64).to(memory_format=torch.channels_last)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return ((actual - exact).norm() / exact.norm()).item()


def compare(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Compares outputs, of heads as well, and all gradients in float64, where rounding cannot hide a difference."""
    outputs = [y if isinstance(y, tuple) else (y,) for y in (ours(x), theirs(x))]
    for actual, expected in zip(*outputs, strict=True):
        assert relative_error(actual, expected) < 1e-9
    directions = [torch.randn_like(y) for y in outputs[0]]
    for output in outputs:
        torch.autograd.backward(output, directions)
    expected = dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        if key == "block8.conv2d.bias" and ours.training:  # BatchNorm takes every constant away
            assert max(p.grad.norm(), expected[key].grad.norm()) < 1e-12
        else:
            assert relative_error(p.grad, expected[key].grad) < 1e-9, key


def layout(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(key, tensor.shape, tensor.dtype) for key, tensor in model.state_dict().items()]


@pytest.mark.parametrize(("name", "options"), ALL)
def test_names_shapes_and_dtypes_are_its_peer_s(name, options):
    with torch.device("meta"):
        ours, theirs = (build(num_classes=1000, **options) for build in PAIRS[name][:2])
    assert layout(ours) == layout(theirs)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_initialisation_is_its_peer_s(name, options):
    """One seed gives the same bits, not only the same distribution."""
    states = []
    for build in PAIRS[name][:2]:
        torch.manual_seed(7)
        states.append(build(num_classes=10, **options).state_dict())
    for key, value in states[1].items():
        assert torch.equal(states[0][key], value), key


@pytest.mark.parametrize(
    ("name", "training"),
    [
        *[pytest.param(name, True, id=f"{name}-train") for name in PAIRS],
        *[pytest.param(name, False, id=f"{name}-eval") for name in ("googlenet", "inception3")],
        *[
            pytest.param(name, False, id=f"{name}-eval", marks=pytest.mark.full)
            for name in ("inception4", "inception_resnet2")
        ],
    ],
)
@pytest.mark.parametrize("algorithm", [pytest.param("torch", marks=pytest.mark.full), "mixed"])
def test_computes_what_its_peer_computes(name, algorithm, training):
    ours, theirs = pair(name, training)
    choose(ours, algorithm)
    x = images(PAIRS[name].size)
    compare(ours, theirs, x)
    if training:
        for key, norm in ours.named_modules():
            if isinstance(norm, BatchNorm2d):
                one_batch = theirs.get_submodule(key)
                torch.testing.assert_close(norm.batch_mean, one_batch.running_mean)
                torch.testing.assert_close(norm.batch_var, one_batch.running_var)
    else:
        with torch.no_grad():
            assert relative_error(ours(x), theirs(x)) < 1e-9


def test_the_head_of_inception3_is_torchvision_s():
    """By itself: it takes 17 x 17 pixels, which are images of 299 x 299."""
    ours, theirs = alike(inception3.Head(64, 10), torchvision.models.inception.InceptionAux(64, 10), True)
    compare(ours, theirs, torch.randn(3, 64, 17, 17, dtype=torch.float64))


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_computed_in_training_alone(name):
    """In place of the head that takes 17 x 17 pixels, both Inceptions v3 have one that takes any number."""
    ours, theirs = pair(name, True, aux=True)
    if name == "inception3":
        any_size = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(768, 10)).double()
        ours.AuxLogits, theirs.AuxLogits = any_size, deepcopy(any_size)
    x = images(PAIRS[name].size)
    compare(ours, theirs, x)
    called: list[nn.Module] = []
    for head in HEADS[name]:
        ours.get_submodule(head).register_forward_hook(lambda module, *_: called.append(module))
    ours(x)
    assert len(called) == len(HEADS[name])
    assert ours.eval()(x).shape == (8, 10)
    assert len(called) == len(HEADS[name])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("googlenet", [0.2, 0.7, 0.7]), ("inception3", [0.5]), ("inception4", [0.2]), ("inception_resnet2", [0.2])],
)
def test_dropout_is_of_training_alone(monkeypatch, name, expected):
    """On images of full size, for which the heads are computed, too."""
    rates: list[float] = []

    def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
        rates.append(p if training else 0.0)
        return x

    monkeypatch.setattr("torch.nn.functional.dropout", dropout)
    with torch.device("meta"):
        model = PAIRS[name].ours(num_classes=10, **({"aux": True} if name in HEADS else {}))
        outputs = model(torch.empty(2, 3, 299, 299))
        assert rates == expected
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        assert [y.shape for y in outputs] == [(2, 10)] * (1 + len(HEADS.get(name, [])))
        rates.clear()
        assert model.eval()(torch.empty(2, 3, 299, 299)).shape == (2, 10)
        assert rates == [0.0]


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Returns the bytes that autograd keeps for backward, parameters and buffers aside."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        kept[id(t.untyped_storage())] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    own = {id(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


@pytest.mark.parametrize("algorithm", ["torch", "triton"])
@pytest.mark.parametrize("name", PAIRS)
def test_keeps_no_more_than_its_peer(name, algorithm):
    """Bytes of an image in fp16, of full size."""
    size = 224 if name == "googlenet" else 299
    with torch.device("meta"):
        ours, theirs = (build(num_classes=1000) for build in PAIRS[name][:2])
        x = torch.empty(1, 3, size, size, dtype=torch.float16).to(memory_format=torch.channels_last)
    choose(ours, algorithm)
    theirs = theirs.half().to(memory_format=torch.channels_last)
    assert activation_bytes(ours, 1, size, torch.float16) <= kept_bytes(theirs, x)
