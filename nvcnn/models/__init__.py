"""The models by name. They take normalised channels-last images in the compute dtype and return fp32 logits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from nvcnn.errors import InputError
from nvcnn.models.lenet import LeNet
from nvcnn.models.resnet import BasicBlock, Bottleneck, ResNet
from nvcnn.models.trivial import Trivial


@dataclass(frozen=True)
class Model:
    """How to build a model (`num_classes` by keyword), its images' height and width, and its default learning rate.

    `learning_rate` is a function of the total batch. `has_v1`: `build` takes `v1=True`, the original bottleneck.
    `pads_images`: it also takes images of four channels, of which the last is zero: tensor cores want them.
    """

    build: Callable[..., nn.Module]
    image_size: int
    learning_rate: Callable[[int], float]
    has_v1: bool = False
    pads_images: bool = True

    def channels(self, device: torch.device) -> int:
        """Returns how many channels images have on that device."""
        return 4 if self.pads_images and device.type != "cpu" else 3


def constant(learning_rate: float) -> Callable[[int], float]:
    return lambda total_batch: learning_rate


def per_image(learning_rate: float) -> Callable[[int], float]:
    return lambda total_batch: learning_rate * total_batch


ResNeXt = partial(ResNet, Bottleneck, groups=32, group_width=4)

MODELS: dict[str, Model] = {
    "trivial": Model(Trivial, 224, constant(0.001), pads_images=False),
    "lenet": Model(LeNet, 28, constant(0.001), pads_images=False),
    "resnet18": Model(partial(ResNet, BasicBlock, (2, 2, 2, 2)), 224, constant(0.5)),
    "resnet34": Model(partial(ResNet, BasicBlock, (3, 4, 6, 3)), 224, per_image(1 / 1024)),
    "resnet50": Model(partial(ResNet, Bottleneck, (3, 4, 6, 3)), 224, per_image(1 / 1024), has_v1=True),
    "resnet101": Model(partial(ResNet, Bottleneck, (3, 4, 23, 3)), 224, per_image(1 / 1024), has_v1=True),
    "resnet152": Model(partial(ResNet, Bottleneck, (3, 8, 36, 3)), 224, per_image(1 / 1024), has_v1=True),
    "resnext50": Model(partial(ResNeXt, (3, 4, 6, 3)), 224, constant(0.1), has_v1=True),
    "resnext101": Model(partial(ResNeXt, (3, 4, 23, 3)), 224, constant(0.1), has_v1=True),
    "resnext152": Model(partial(ResNeXt, (3, 8, 36, 3)), 224, constant(0.1), has_v1=True),
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
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        return model.build(num_classes=num_classes, **({"v1": True} if resnet_v1 else {}))
