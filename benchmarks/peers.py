"""Makes what users would otherwise call importable beside any PyTorch, and holds it to the rules that ours keeps."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

CUDNN = "cudnn.benchmark and cudnn.deterministic"  # tables say it of both contenders


def cudnn() -> AbstractContextManager[None]:
    """Returns a context with the fastest of cuDNN's deterministic algorithms, as `nvcnn.machine.use_device` has it."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True)


def loads(library: Path) -> bool:
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


def declare_torchvision_operators() -> torch.library.Library | None:
    """Lets `import torchvision` succeed where its compiled operators do not fit this PyTorch, such as a CPU build.

    Importing it registers fake versions of two operators, whose schemas must be known. Models and transforms need
    neither. Returns the declaration, which lasts as long as that object, or None where none is needed.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or any(map(loads, Path(spec.origin).parent.glob("_C*"))):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


TORCHVISION_OPERATORS = declare_torchvision_operators()

TORCHVISION = {
    "alexnet": "alexnet",
    "googlenet": "googlenet",
    **{f"vgg{depth}": f"vgg{depth}" for depth in (11, 13, 16, 19)},
    "inception3": "inception_v3",
    **{f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    "resnext50": "resnext50_32x4d",
}
TIMM = {"inception4": "inception_v4", "inception-resnet2": "inception_resnet_v2", "resnext101": "resnext101_32x4d"}


def peer(name: str, num_classes: int = 1000, aux: bool = False) -> tuple[nn.Module, str]:
    """Returns the model of that name as others have it, and who they are. aux: with its auxiliary heads."""
    if name in TORCHVISION:
        from torchvision import models

        heads = {"aux_logits": aux, "init_weights": False} if name in ("googlenet", "inception3") else {}
        return getattr(models, TORCHVISION[name])(num_classes=num_classes, **heads), "torchvision"
    if name in TIMM or name == "resnext152":
        from timm.models import create_model, resnet

        if name in TIMM:
            return create_model(TIMM[name], num_classes=num_classes), "timm"
        of_groups = {"cardinality": 32, "base_width": 4, "num_classes": num_classes}
        return resnet.ResNet(resnet.Bottleneck, (3, 8, 36, 3), **of_groups), "timm's ResNet class"
    return PLAIN[name](num_classes), "a plain build"


class Plain(nn.Module):
    """Features, which are flattened, and a classifier, of PyTorch's modules."""

    def __init__(self, features: list[nn.Module], classifier: list[nn.Module], channels_last: bool):
        super().__init__()
        self.features, self.classifier = nn.Sequential(*features), nn.Sequential(*classifier)
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier((x.permute(0, 2, 3, 1) if self.channels_last else x).flatten(1))


def convolutions(*layers: tuple[int, int, int, int, int, bool]) -> list[nn.Module]:
    """Returns the layers for rows of channels in and out, kernel size, stride, padding, and whether pooling follows."""
    found: list[nn.Module] = []
    for c_in, c_out, size, stride, padding, pools in layers:
        found += [nn.Conv2d(c_in, c_out, size, stride, padding), nn.ReLU()] + [nn.MaxPool2d(2)] * pools
    return found


def hidden(*widths: int) -> list[nn.Module]:
    """Returns linear layers between these widths, with a ReLU after each but the last."""
    layers: list[nn.Module] = [layer for c in pairwise(widths) for layer in (nn.Linear(*c), nn.ReLU())]
    return layers[:-1]


# What nobody else has. OverFeat is the fast model of its paper's table 1, with the padding of nvcnn_hvd.py.
PLAIN: dict[str, Callable[[int], nn.Module]] = {
    "trivial": lambda classes: Plain([], hidden(3 * 224 * 224, 1, classes), channels_last=True),
    "lenet": lambda classes: Plain(
        convolutions((3, 32, 5, 1, 2, True), (32, 64, 5, 1, 2, True)),
        hidden(7 * 7 * 64, 512, classes),
        channels_last=True,
    ),
    "overfeat": lambda classes: Plain(
        convolutions(
            (3, 96, 11, 4, 0, True),
            (96, 256, 5, 1, 0, True),
            (256, 512, 3, 1, 1, False),
            (512, 1024, 3, 1, 1, False),
            (1024, 1024, 3, 1, 1, True),
        ),
        hidden(1024 * 6 * 6, 3072, 4096, classes),
        channels_last=False,
    ),
}
