"""What every test of a kernel has: both implementations, poisoned outputs, small blocks."""

import warnings

import numpy
import pytest
import torch

from kernels import configurations
from kernels.operators import looked_up_again


@pytest.fixture(scope="module", params=["reference", "triton"])
def implementation(request):
    """Every test that asks for it runs with both. The interpreter's numpy does not warn of overflows."""
    with pytest.MonkeyPatch.context() as patch, numpy.errstate(all="ignore"):
        patch.setenv("NVCNN_KERNELS", request.param)
        yield request.param


@pytest.fixture(scope="module", autouse=True)
def poisoned():
    """Fresh memory is NaN, or the largest integer: a value that a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def forgotten():
    """No test repeats the launches of another, which may be configured otherwise."""
    with looked_up_again():
        yield


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Tensors without memory take the interpreter's table, too. On a GPU kernels are configured as they train."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(configurations, "table_name", lambda device: configurations.TEST)
        yield
