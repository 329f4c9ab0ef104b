"""Which implementation of an op runs, by the environment variable NVCNN_KERNELS.

`auto` (default): the Triton kernel for CUDA tensors and for those on "meta", without memory, the reference for CPU
tensors. `reference` and `triton`: that one everywhere; Triton's interpreter runs kernels on CPU tensors where
TRITON_INTERPRET=1. Kernels written in Gluon have no interpreter: with `triton`, too, the reference runs on CPU tensors.
"""

import os

import torch
from triton import knobs

# A product and a sum become one instruction: Triton's default up to 3.9, which warns that it will not stay.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

INTERPRETED = bool(knobs.runtime.interpret)  # as it was when the kernels were decorated: they do not follow a change


def runs_triton(device: torch.device) -> bool:
    """Returns whether tensors on `device` are for the Triton kernel. Raises ValueError if it cannot run there."""
    choice = os.environ.get("NVCNN_KERNELS", "auto")
    if choice not in ("auto", "reference", "triton"):
        raise ValueError(f"NVCNN_KERNELS={choice}: it must be auto, reference or triton")
    if choice == "triton" and device.type == "cpu" and not INTERPRETED:
        raise ValueError("NVCNN_KERNELS=triton: tensors on the CPU need TRITON_INTERPRET=1, set before Python starts")
    return choice == "triton" or (choice == "auto" and device.type in ("cuda", "meta"))


def runs_gluon(device: torch.device) -> bool:
    """Returns whether tensors on `device` are for a kernel written in Gluon. On a CPU they never are: see above."""
    return runs_triton(device) and device.type != "cpu"


def keep_masks_boolean() -> None:
    """Mends Triton 3.9's interpreter: a scalar's comparison spread over a block becomes int32, and no mask."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    splat = InterpreterBuilder.create_splat

    def create_splat(self, shape, scalar):
        block = splat(self, shape, scalar)
        return TensorHandle(block.data.astype(bool), block.dtype) if scalar.data.dtype == bool else block

    InterpreterBuilder.create_splat = create_splat


if INTERPRETED:
    keep_masks_boolean()
