"""BatchNorm's `norm`: the rows, (5, C), fp32, by which whoever reads x normalises it, and those of its gradient.

v = (x - MEAN) SCALE + SHIFT. The mean is MEAN + MEAN_LOW, and RSTD is 1 / sqrt(var + eps).
dx = SCALE g + FACTORS[0] (x - MEAN) + FACTORS[1]; D_GAMMA and D_BETA are the parameters' gradients.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

MEAN, SCALE, SHIFT, RSTD, MEAN_LOW = (tl.constexpr(row) for row in range(5))
FACTORS, D_GAMMA, D_BETA = slice(0, 2), 2, 3  # of the gradient, whose last row is 0


class Norm(NamedTuple):
    """The rows by name: Norm(*norm).scale is (C,)."""

    mean: Tensor
    scale: Tensor
    shift: Tensor
    rstd: Tensor
    mean_low: Tensor


@triton.jit
def load_row(norm, ROW: tl.constexpr, c, known, C):
    """Returns a row's values for the channels c; 0 for those that are not known."""
    return tl.load(norm + ROW * C + c, mask=known, other=0.0)


@triton.jit
def normalised(x, norm, c, known, C):
    """Returns (x - mean) scale + shift; x is (rows, channels c)."""
    mean = load_row(norm, MEAN, c, known, C)[None, :]
    scale = load_row(norm, SCALE, c, known, C)[None, :]
    return (x.to(tl.float32) - mean) * scale + load_row(norm, SHIFT, c, known, C)[None, :]


@triton.jit
def through_batch_norm(g, y, norm, factors, inside, k, known, K):
    """Returns dy, the gradient behind BatchNorm: scale g + factors[0] (y - mean) + factors[1], or scale g.

    g, y: (rows, channels k).
    """
    dy = load_row(norm, SCALE, k, known, K)[None, :] * g.to(tl.float32)
    if factors is not None:
        mean = load_row(norm, MEAN, k, known, K)[None, :]
        slope = load_row(factors, 0, k, known, K)[None, :]
        dy += slope * (y.to(tl.float32) - mean) + load_row(factors, 1, k, known, K)[None, :]
    return tl.where(inside, dy, 0.0)
