"""GoogLeNet and the Inceptions against torchvision's and timm's: names, initialisation, outputs, gradients, memory."""

from collections.abc import Callable
from itertools import cycle
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

from nvcnn.meta import activation_bytes
from nvcnn.models import ALGORITHMS, inception3
from nvcnn.models.inception3 import Inception3
from nvcnn.models.layers import BatchNorm2d, Conv2d


class Pair(NamedTuple):
    """Our model and its peer, both functions of the number of classes, and the smallest images that they take."""

    ours: Callable[..., nn.Module]
    theirs: Callable[..., nn.Module]
    size: int


def torchvision_s(name: str) -> Callable[..., nn.Module]:
    def build(num_classes: int, aux: bool = False, init_weights: bool = False) -> nn.Module:
        options = {"aux_logits": aux, "init_weights": init_weights, "transform_input": False}
        return getattr(torchvision.models, name)(num_classes=num_classes, **options)

    return build


PAIRS = {
    "inception3": Pair(Inception3, torchvision_s("inception_v3"), 75),
}


def pair(name: str, training: bool, **options: bool) -> tuple[nn.Module, nn.Module]:
    """Returns our net and the peer, both with the same random state, in float64 and without dropout.

    The peer has our epsilon, and a momentum of 1: its running statistics are those of one batch.
    """
    torch.manual_seed(0)
    ours, theirs = PAIRS[name].ours(num_classes=10, **options), PAIRS[name].theirs(num_classes=10, **options)
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


def choose(model: nn.Module, algorithm: str) -> None:
    """Has `algorithm` compute every convolution, or, "mixed", all of them in turn."""
    order = "0010203112132233"  # every two are neighbours, in either order, and each is its own
    convolutions = [m for m in model.modules() if isinstance(m, Conv2d)]
    for module, i in zip(convolutions, cycle(order), strict=False):
        module.algorithm = ALGORITHMS[int(i)] if algorithm == "mixed" else algorithm


def images(n: int, size: int) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64).to(memory_format=torch.channels_last)


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
        assert relative_error(p.grad, expected[key].grad) < 1e-9, key


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("algorithm", ["torch", "mixed"])
@pytest.mark.parametrize("name", PAIRS)
def test_computes_what_its_peer_computes(name, algorithm, training):
    ours, theirs = pair(name, training)
    choose(ours, algorithm)
    x = images(3, PAIRS[name].size)
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
    """The head alone, since it takes 17 x 17 pixels, which are images of 299 x 299."""
    ours, theirs = (net.double() for net in (inception3.Head(48, 10), torchvision.models.inception.InceptionAux(48, 10)))
