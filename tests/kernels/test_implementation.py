import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kernels import implementation

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("choice", "cpu", "cuda"), [(None, False, True), ("auto", False, True), ("reference", False, False)]
)
def test_choice(monkeypatch, choice, cpu, cuda):
    monkeypatch.delenv("NVCNN_KERNELS", raising=False)
    if choice:
        monkeypatch.setenv("NVCNN_KERNELS", choice)
    assert (implementation.runs_triton(CPU), implementation.runs_triton(CUDA)) == (cpu, cuda)


@pytest.mark.parametrize("interpreted", [False, True])
def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch, interpreted):
    monkeypatch.setenv("NVCNN_KERNELS", "triton")
    monkeypatch.setattr(implementation, "INTERPRETED", interpreted)
    assert implementation.runs_triton(CUDA)
    assert implementation.runs_gluon(CUDA)
    if interpreted:
        assert implementation.runs_triton(CPU)
        assert not implementation.runs_gluon(CPU), "Gluon has no interpreter"
    else:
        with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
            implementation.runs_triton(CPU)


def test_refuses_an_unknown_choice(monkeypatch):
    monkeypatch.setenv("NVCNN_KERNELS", "Triton")
    with pytest.raises(ValueError, match="NVCNN_KERNELS=Triton: it must be auto, reference or triton"):
        implementation.runs_triton(CPU)


@pytest.mark.skipif(not implementation.INTERPRETED, reason="of Triton's interpreter")
def test_a_comparison_of_scalars_spread_over_a_block_is_a_mask():
    seven = TensorHandle(np.array([7], np.int32), tl.int32)
    builder = InterpreterBuilder()
    spread = builder.create_splat(tl.block_type(tl.int1, [4]), builder.create_icmpEQ(seven, seven))
    assert spread.data.dtype == bool
    assert builder.create_splat(tl.block_type(tl.int32, [4]), seven).data.dtype == np.int32


def test_import_asks_for_no_gpu():
    """It makes neither a CUDA context nor Triton's driver, which would raise where there is no GPU."""
    code = "import kernels, torch, triton\nassert not torch.cuda.is_initialized() and not triton.runtime.driver._active"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
