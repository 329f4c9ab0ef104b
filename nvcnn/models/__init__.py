"""The models by name. They take normalised channels-last images in the compute dtype and return fp32 logits.

Reading flags needs the names, so torch is imported only once a model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nvcnn.program import InputError

if TYPE_CHECKING:
    from torch import nn

ALGORITHMS = ("torch", "triton", "triton-materialized", "cudnn")  # that compute a convolution: see fused.py


@dataclass(frozen=True)
class Model:
    """How to build a model (`num_classes` by keyword), its images' height and width, and its default learning rate.

    `learning_rate` is a function of the total batch. `has_v1`: `build` takes `v1=True`, the original bottleneck.
    """

    build: Callable[..., nn.Module]
    image_size: int
    learning_rate: Callable[[int], float]
    has_v1: bool = False


def constant(learning_rate: float) -> Callable[[int], float]:
    return lambda total_batch: learning_rate


def per_image(learning_rate: float) -> Callable[[int], float]:
    return lambda total_batch: learning_rate * total_batch


def build_trivial(num_classes: int) -> nn.Module:
    from nvcnn.models.trivial import Trivial

    return Trivial(num_classes=num_classes)


def build_lenet(num_classes: int) -> nn.Module:
    from nvcnn.models.lenet import LeNet

    return LeNet(num_classes=num_classes)


def build_resnet(block: str, depths: tuple[int, ...], **options: Any) -> nn.Module:
    from nvcnn.models import resnet

    return resnet.ResNet(getattr(resnet, block), depths, **options)


basic = partial(build_resnet, "BasicBlock")
bottleneck = partial(build_resnet, "Bottleneck")
resnext = partial(bottleneck, groups=32, group_width=4)

MODELS: dict[str, Model] = {
    "trivial": Model(build_trivial, 224, constant(0.001)),
    "lenet": Model(build_lenet, 28, constant(0.001)),
    "resnet18": Model(partial(basic, (2, 2, 2, 2)), 224, constant(0.5)),
    "resnet34": Model(partial(basic, (3, 4, 6, 3)), 224, per_image(1 / 1024)),
    "resnet50": Model(partial(bottleneck, (3, 4, 6, 3)), 224, per_image(1 / 1024), has_v1=True),
    "resnet101": Model(partial(bottleneck, (3, 4, 23, 3)), 224, per_image(1 / 1024), has_v1=True),
    "resnet152": Model(partial(bottleneck, (3, 8, 36, 3)), 224, per_image(1 / 1024), has_v1=True),
    "resnext50": Model(partial(resnext, (3, 4, 6, 3)), 224, constant(0.1), has_v1=True),
    "resnext101": Model(partial(resnext, (3, 4, 23, 3)), 224, constant(0.1), has_v1=True),
    "resnext152": Model(partial(resnext, (3, 8, 36, 3)), 224, constant(0.1), has_v1=True),
}


def find_model(name: str, resnet_v1: bool = False) -> Model:
    """Returns the model of that name. Raises InputError for an unknown one, and for `resnet_v1` without bottlenecks."""
    if name not in MODELS:
        raise InputError(f"--model={name}: unknown, choose one of {', '.join(MODELS)}")
    if resnet_v1 and not MODELS[name].has_v1:
        having = ", ".join(n for n, m in MODELS.items() if m.has_v1)
        raise InputError(f"--resnet_v1 is for {having}; --model={name} has no bottleneck blocks, leave the flag out")
    return MODELS[name]


def build_model(name: str, *, num_classes: int, resnet_v1: bool = False, seed: int) -> nn.Module:
    """Returns the model in fp32, on the CPU, in training mode: (N, 3, H, W) -> (N, num_classes).

    One seed, one set of weights, whatever was drawn before. Raises InputError as `find_model`.
    """
    model = find_model(name, resnet_v1)
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        return model.build(num_classes=num_classes, **({"v1": True} if resnet_v1 else {}))
