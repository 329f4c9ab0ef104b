"""BatchNorm's `norm`: the rows, (5, C), fp32, by which whoever reads x normalises it, and those of its gradient.

v = (x - MEAN) SCALE + SHIFT. The mean is MEAN + MEAN_LOW, and RSTD is 1 / sqrt(var + eps).
dx = SCALE g + FACTORS[0] (x - MEAN) + FACTORS[1]; D_GAMMA and D_BETA are the parameters' gradients.
"""

from typing import NamedTuple

import torch
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


def normalise(x: Tensor, norm: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Returns relu(normalised x + residual) in plain PyTorch. Arguments as in `batch_norm`."""
    mean, scale, shift, *_ = norm
    y = torch.batch_norm(x, scale, shift, mean, torch.ones_like(mean), False, 0.0, 0.0, False)  # F's refuses eps 0
    if residual is not None:
        y.add_(residual)
    return y.relu_() if relu else y


def sums_reference(g: Tensor, x: Tensor, norm: Tensor) -> Tensor:
    """Returns the sums of g and of g (x - mean), (2, 1, C), in plain PyTorch."""
    g, d = g.to(norm.dtype), x - Norm(*norm).mean.view(-1, 1, 1)
    return torch.stack((g.sum((0, 2, 3)), (g * d).sum((0, 2, 3)))).unsqueeze(1)


def data_gradient_reference(g: Tensor, x: Tensor, norm: Tensor, factors: Tensor | None) -> Tensor:
    """Returns dx in plain PyTorch. Arguments as in `batch_norm_data_gradient`."""
    dx = g * Norm(*norm).scale.view(-1, 1, 1)
    if factors is not None:
        slope, offset, mean = (v.view(-1, 1, 1) for v in (*factors, Norm(*norm).mean))
        dx += slope * (x - mean) + offset
    return dx.to(g.dtype)


def activation(
    x: Tensor, norm: Tensor | None, residual: Tensor | None = None, residual_norm: Tensor | None = None
) -> Tensor:
    """Returns what a convolution multiplies, in plain PyTorch. Arguments as in `convolution`."""
    if norm is None:
        return x
    if residual is not None and residual_norm is not None:
        residual = normalise(residual, residual_norm, None, False)
    return normalise(x, norm, residual, True)


def output_gradient(g: Tensor, y: Tensor | None, norm: Tensor | None, factors: Tensor | None) -> Tensor:
    """Returns dy in plain PyTorch. Arguments as in `convolution_data_gradient`."""
    return g if norm is None else data_gradient_reference(g, g if y is None else y, norm, factors)
