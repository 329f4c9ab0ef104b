import numpy
import pytest


@pytest.fixture(scope="module", params=["reference", "triton"])
def implementation(request):
    """Every test that asks for it runs with both. The interpreter's numpy need not warn of what tests overflow."""
    with pytest.MonkeyPatch.context() as patch, numpy.errstate(all="ignore"):
        patch.setenv("NVCNN_KERNELS", request.param)
        yield request.param
