"""nvcnn: trains ImageNet-class CNNs on one to many GPUs. The parts and how they fit: docs/architecture.md."""

from importlib.util import find_spec
from pathlib import Path

__version__ = "0.1.0"


def _require_our_kernels() -> None:
    """Another package on PyPI is also imported as `kernels`; found first, it would fail far from the cause.

    Looks the name up without importing it: torch and triton stay unloaded. Raises ImportError naming the path found.
    """
    ours = Path(__file__).resolve().parent.parent / "kernels"
    spec = find_spec("kernels")
    if spec is None:
        raise ImportError(f"nvcnn needs the package `kernels` of {ours}, which Python does not find")
    found = [Path(folder).resolve() for folder in spec.submodule_search_locations or [spec.origin or ""]]
    if ours not in found[:1]:
        raise ImportError(
            f"`import kernels` finds {found[0]}, not nvcnn's own {ours}: "
            f"uninstall the other one, or put {ours.parent} first on PYTHONPATH"
        )


_require_our_kernels()
