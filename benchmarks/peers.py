"""What users would otherwise call, made importable beside any PyTorch, and under the rules that ours keeps to."""

from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path

import torch

CUDNN = "cudnn.benchmark and cudnn.deterministic"  # what a table says of both contenders


def cudnn() -> AbstractContextManager[None]:
    """The fastest of cuDNN's deterministic algorithms, as `nvcnn.machine.use_device` has it for a run."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=True)


def loads(library: Path) -> bool:
    try:
        torch.ops.load_library(library)
    except OSError:
        return False
    return True


def declare_torchvision_operators() -> torch.library.Library | None:
    """Lets `import torchvision` succeed where its compiled operators do not fit this PyTorch, as a CPU build.

    Importing it registers fake versions of two operators, whose schemas must be known. Models and transforms need
    neither. The declaration lasts as long as what is returned.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or any(map(loads, Path(spec.origin).parent.glob("_C*"))):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


TORCHVISION_OPERATORS = declare_torchvision_operators()
