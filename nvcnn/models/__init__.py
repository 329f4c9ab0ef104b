"""The models by name. They take normalised channels-last images in the compute dtype and return fp32 logits.

In training, one with auxiliary heads returns a tuple: its logits, then those of the heads, whose losses count
`model.aux_weight` each.

Reading flags needs the names, so torch is imported only once a model is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nvcnn.program import InputError

if TYPE_CHECKING:
    from torch import nn

# They compute a convolution: see fused.py.
ALGORITHMS = ("torch", "triton", "triton-materialized", "triton-gram", "cudnn", "cudnn-gram")
JOINT = "triton-joint"  # another, which --conv=auto alone chooses
EPSILON = 1e-4  # of BatchNorm, as in nvcnn_hvd.py
FLAGS = {  # what a model needs for them
    "resnet_v1": "bottleneck blocks",
    "aux": "auxiliary heads",
    "zero_gamma": "residual blocks that end in a BatchNorm",
}


@dataclass(frozen=True)
class Model:
    """How to build a model (`num_classes` by keyword), its images' height and width, and its default learning rate.

    learning_rate: a function of the total batch. least_size: that of images which it takes, too; None where its layers
    fix the size. flags: those that `build` takes.
    """

    build: Callable[..., nn.Module]
    image_size: int
    learning_rate: Callable[[int], float]
    least_size: int | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a model's weights. The defaults are those of nvcnn_hvd.py.

    image_size: height and width. train_size: those in training, where they are others.
    eval_crop: share of height and width, which evaluation stretches to a square; or, where eval_aspect is "keep", of
    the shorter side, and evaluation sees a square.
    """

    image_size: int
    normalize: str = "signed"
    eval_crop: float = 0.875
    eval_aspect: str = "stretch"
    eval_interpolation: str = "bilinear"
    train_size: int | None = None

    @property
    def training_size(self) -> int:
        return self.train_size or self.image_size

    def trained_at(self, size: int) -> Preprocessing:
        """Returns the same with that size in training."""
        return replace(self, train_size=None if size == self.image_size else size)

    def __str__(self) -> str:
        size, crop = self.image_size, f"{self.eval_crop:.4g}, {self.eval_aspect}, {self.eval_interpolation}"
        training = f" (in training {self.train_size} x {self.train_size})" if self.train_size else ""
        return f"{size} x {size}{training}, pixels {self.normalize}; in evaluation crop {crop}"


@dataclass(frozen=True)
class Origin:
    """What belongs to weights beside their values: how images are prepared, what the model is built with."""

    preprocessing: Preprocessing
    options: dict[str, Any]


def constant(learning_rate: float) -> Callable[[int], float]:
    return lambda total_batch: learning_rate


def per_image(learning_rate: float) -> Callable[[int], float]:
    return lambda total_batch: learning_rate * total_batch


def network(module: str, name: str, **options: Any) -> Callable[..., nn.Module]:
    """Returns what builds the class of that name in nvcnn.models.`module`."""
    return lambda **others: getattr(import_module(f"nvcnn.models.{module}"), name)(**options, **others)


RESNEXT = {"groups": 32, "group_width": 4}
BOTTLENECK = ("resnet_v1", "zero_gamma")

MODELS: dict[str, Model] = {
    "trivial": Model(network("trivial", "Trivial"), 224, constant(0.001)),
    "lenet": Model(network("lenet", "LeNet"), 28, constant(0.001)),
    "alexnet": Model(network("alexnet", "AlexNet"), 227, constant(0.03), 67),
    "overfeat": Model(network("overfeat", "OverFeat"), 231, constant(0.001)),
    "googlenet": Model(network("googlenet", "GoogLeNet"), 224, constant(0.04), 32, ("aux",)),
    "vgg11": Model(network("vgg", "VGG", depth=11), 224, constant(0.02), 32),
    "vgg13": Model(network("vgg", "VGG", depth=13), 224, constant(0.02), 32),
    "vgg16": Model(network("vgg", "VGG", depth=16), 224, constant(0.02), 32),
    "vgg19": Model(network("vgg", "VGG", depth=19), 224, constant(0.02), 32),
    "inception3": Model(network("inception3", "Inception3"), 299, constant(0.2), 75, ("aux",)),
    "inception4": Model(network("inception4", "Inception4"), 299, constant(0.045), 75),
    "inception-resnet2": Model(network("inception_resnet2", "InceptionResNet2"), 299, constant(0.045), 75),
    "resnet18": Model(network("resnet", "resnet", depth=18), 224, constant(0.5), 32, ("zero_gamma",)),
    "resnet34": Model(network("resnet", "resnet", depth=34), 224, per_image(1 / 1024), 32, ("zero_gamma",)),
    "resnet50": Model(network("resnet", "resnet", depth=50), 224, per_image(1 / 1024), 32, BOTTLENECK),
    "resnet101": Model(network("resnet", "resnet", depth=101), 224, per_image(1 / 1024), 32, BOTTLENECK),
    "resnet152": Model(network("resnet", "resnet", depth=152), 224, per_image(1 / 1024), 32, BOTTLENECK),
    "resnext50": Model(network("resnet", "resnet", depth=50, **RESNEXT), 224, constant(0.1), 32, BOTTLENECK),
    "resnext101": Model(network("resnet", "resnet", depth=101, **RESNEXT), 224, constant(0.1), 32, BOTTLENECK),
    "resnext152": Model(network("resnet", "resnet", depth=152, **RESNEXT), 224, constant(0.1), 32, BOTTLENECK),
}


def kept(image_size: int, resize: int, interpolation: str, normalize: str, **options: Any) -> Origin:
    """Returns the origin of weights that are evaluated on the middle of images whose shorter side is `resize`."""
    return Origin(Preprocessing(image_size, normalize, image_size / resize, "keep", interpolation), options)


# Who published weights by these names and shapes. What is here belongs to those that torchvision calls DEFAULT, and to
# those that timm loads by the name of the model alone.
V1 = kept(224, 256, "bilinear", "imagenet", epsilon=1e-5)
V2 = kept(224, 232, "bilinear", "imagenet", epsilon=1e-5)
A1 = kept(224, 235, "bicubic", "imagenet", epsilon=1e-5)
VGG = kept(224, 256, "bilinear", "imagenet")

ORIGINS: dict[str, dict[str, Origin]] = {
    "torchvision": {
        "alexnet": kept(224, 256, "bilinear", "imagenet", padding=2),
        "googlenet": kept(224, 256, "bilinear", "signed", epsilon=1e-3),
        **dict.fromkeys(("vgg11", "vgg13", "vgg16", "vgg19"), VGG),
        "inception3": kept(299, 342, "bilinear", "signed", epsilon=1e-3),
        **dict.fromkeys(("resnet18", "resnet34"), V1),
        **dict.fromkeys(("resnet50", "resnet101", "resnet152", "resnext50"), V2),
    },
    "timm": {
        **dict.fromkeys(("vgg11", "vgg13", "vgg16", "vgg19"), VGG),
        "inception3": kept(299, 341, "bicubic", "signed", epsilon=1e-3),
        "inception4": kept(299, 341, "bicubic", "signed", epsilon=1e-3),
        "inception-resnet2": kept(299, 333, "bicubic", "signed", epsilon=1e-3),
        **dict.fromkeys(("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50"), A1),
        "resnext101": kept(224, 256, "bilinear", "imagenet", epsilon=1e-5),
    },
}


def find_model(name: str, **flags: bool) -> Model:
    """Returns the model of that name. Raises InputError for an unknown one, and for a flag of FLAGS that it lacks."""
    if name not in MODELS:
        raise InputError(f"--model={name}: unknown, choose one of {', '.join(MODELS)}")
    for flag, what in FLAGS.items():
        if flags.get(flag) and flag not in MODELS[name].flags:
            having = ", ".join(n for n, model in MODELS.items() if flag in model.flags)
            raise InputError(f"--{flag} is for {having}; --model={name} has no {what}, leave the flag out")
    return MODELS[name]


def build_model(name: str, *, num_classes: int, seed: int, epsilon: float = EPSILON, **options: Any) -> nn.Module:
    """Returns the model in fp32, on the CPU, in training mode: (N, 3, H, W) -> (N, num_classes).

    options: FLAGS that are set, and others that belong to the origin of weights. epsilon: of BatchNorm.
    One seed, one set of weights, whatever was drawn before. Raises InputError as `find_model`.
    """
    options = {option: value for option, value in options.items() if value}
    build = find_model(name, **options).build
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        model = build(num_classes=num_classes, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = epsilon
    return model
