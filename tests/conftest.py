"""Every test has kernels that run without a GPU, a torchvision that imports without one, and the device."""

import gc
import os
import signal
import tarfile
from typing import Any

import numpy
import pytest
import torch
from hypothesis import Phase, settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of kernels, which are decorated for good

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

import benchmarks.peers  # noqa: F401 (makes torchvision importable)

# What newer Pythons ask for, and those before 3.11.4 do not have.
tarfile.TarFile.extraction_filter = staticmethod(getattr(tarfile, "data_filter", None))  # type: ignore[assignment]

# By default cuDNN takes TF32 for fp32, as matrix products may: no measure of what is computed in fp32.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

# A shell has what it starts in the background ignore Ctrl-C, and programs that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes that share the cores: with more threads than cores they wait for each other.
torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

# Without shrinking: in the interpreter it takes five minutes and more, and the failing example is printed either way.
UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)
# On a GPU most examples have a kernel of their own, which takes seconds to compile.
EXAMPLES = 5 if torch.cuda.is_available() else 25
settings.register_profile("default", deadline=None, max_examples=EXAMPLES, phases=UNSHRUNK)
settings.register_profile("full", deadline=None, max_examples=1000)  # pytest --hypothesis-profile=full
settings.load_profile("default")


def replaced(function: InterpretedFunction) -> bool:
    """Returns whether the language, as the function knows it, is the interpreter's: a launch replaces it."""
    if not hasattr(function, "languages"):
        function.languages = [value for value in function.fn.__globals__.values() if value is tl or value is tl.core]
    return not any(tl.core.is_builtin(language.load) for language in function.languages)


def call(function: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
    """Calls a function in a kernel. Triton would replace the language again each time, a fifth of all it does."""
    return function.rewrite()(*args, **kwargs) if replaced(function) else whole_call(function, *args, **kwargs)


def numpys(kind: tl.dtype) -> numpy.dtype:
    """Returns numpy's dtype of one of Triton's. Triton would make the table anew each time, a tenth of what it does."""
    if kind.name not in known:
        known[kind.name] = looked_up(kind)
    return known[kind.name]


known: dict[str, numpy.dtype] = {}
looked_up, whole_call = getattr(interpreter, "_get_np_dtype", None), InterpretedFunction.__call__
if looked_up and hasattr(InterpretedFunction, "rewrite"):  # both are Triton's own affair: 3.6 and 3.7 have them
    interpreter._get_np_dtype, InterpretedFunction.__call__ = numpys, call


def pytest_collection_finish() -> None:
    """Spares later collections of garbage, of which each pool of workers makes one, what stays until the end anyway."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
