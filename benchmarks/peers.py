"""Makes what users would otherwise call importable beside any PyTorch, and holds it to the rules that ours keeps."""

from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path

import torch

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
