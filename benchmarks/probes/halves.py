"""Computes with fp16 values two at a time, by PTX instructions that Triton has no name for.

A multiply-add rounds once (PTX ISA, "Half Precision Floating Point Instructions"). Triton's interpreter knows no inline
assembly. There the same values come from fp32, where product and sum are exact or rounded far below a half.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.implementation import INTERPRETED

INTERPRET = tl.constexpr(INTERPRETED)
MOST = tl.constexpr(240.0)  # its square is still a finite half


@triton.jit
def fma(x, scale, shift):
    """Returns x scale + shift."""
    if INTERPRET:
        return (x.to(tl.float32) * scale.to(tl.float32) + shift.to(tl.float32)).to(tl.float16)
    asm: tl.constexpr = "fma.rn.f16x2 $0, $1, $2, $3;"
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [x, scale, shift], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def fma_relu(x, scale, shift):
    """Returns relu(x scale + shift). A NaN stays one."""
    if INTERPRET:
        return tl.maximum(fma(x, scale, shift), 0.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
    asm: tl.constexpr = "fma.rn.relu.f16x2 $0, $1, $2, $3;"
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [x, scale, shift], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def deviation(y, inverse, shift):
    """Returns (y - mean) / deviation as y inverse + shift, kept between -MOST and MOST. A NaN stays one."""
    if INTERPRET:
        d = fma(y, inverse, shift)
        d = tl.minimum(d, MOST, propagate_nan=tl.PropagateNan.ALL)
        return tl.maximum(d, -MOST, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
    # It takes the smaller of the absolute values, with the sign of d. 0x5B80 is MOST.
    asm: tl.constexpr = (
        "{ .reg .b32 d, most; fma.rn.f16x2 d, $1, $2, $3; mov.b32 most, 0x5B805B80; "
        "min.NaN.xorsign.abs.f16x2 $0, d, most; }"
    )
    return tl.inline_asm_elementwise(asm, "=r,r,r,r", [y, inverse, shift], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def column_sums(values, total):
    """Returns total, 16 equal rows of fp32, plus the sums of the columns.

    Tensor cores compute them, which take 19 bits of fp32 values.
    """
    ones = tl.full((16, values.shape[0]), 1.0, values.dtype)
    return tl.dot(ones, values, total, input_precision="tf32")


@triton.jit
def one_row(rows):
    """Returns one of 16 equal rows, as their sum over 16, which is exact and keeps a NaN."""
    return tl.sum(rows, 0) * 0.0625


def normalised(x: Tensor, norm: Tensor) -> Tensor:
    """Returns what `fma` does, in PyTorch. x: (rows, C). norm: (2, C), scale and shift. All are halves."""
    return (x.double() * norm[0].double() + norm[1].double()).half()


def random_norm(channels: int, device: torch.device) -> Tensor:
    """Returns (2, channels), halves: a scale around 1 and a shift around 0."""
    scale, shift = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device) * 0.3
    return torch.stack((scale, shift)).half()
