"""BatchNorm's statistics of a batch, and `norm`, by which whoever reads x normalises it.

    mean = sum(x) / n,   var = sum((x - mean)^2) / n,   rstd = (var + eps)^-1/2     over N, H, W, per channel
    (x - mean) rstd gamma + beta  =  (x - mean) scale + shift
Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1. The running statistics get var n / (n - 1), as in PyTorch.

Sums are taken of x - center, where center is a value of the channel itself (the first pixel's), so that a mean that is
large against the deviation costs no digits: with m = sum(x - center) / n, var = sum((x - center)^2) / n - m^2. What the
fp32 mean rounds off is kept (`mean_low`), and is part of shift. The producer of x may bring the sums with it
(`norm_from_sums`).

Bytes: reads x once, 2 per fp16 value; the partial sums, 8 a channel and part, stay in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_images, check_tensors, single_or_double
from kernels.configurations import cdiv
from kernels.implementation import runs_triton
from kernels.launch import launch, state
from kernels.norm_rows import MEAN, MEAN_LOW, RSTD, SCALE, SHIFT
from kernels.operators import named, operator
from kernels.partial_sums import NORM_CONFIG, few_parts, parts_of_rows, sum_parts
from kernels.tiles import configured_for_rows


def reference(x, gamma, beta, batch_mean, batch_var, *, eps):
    """Returns `norm` in plain PyTorch, in the precision of `gamma`. Arguments as in `batch_norm_statistics`."""
    # Running statistics of a momentum of 0: they stay, and make PyTorch answer in their dtype.
    mean, var = torch.batch_norm_update_stats(x, torch.zeros_like(gamma), torch.ones_like(gamma), 0.0)
    n = x.numel() // x.shape[1]
    batch_mean.copy_(mean)
    torch.mul(var, n / (n - 1), out=batch_var)
    return norm_of(mean, var, gamma, beta, eps)


def norm_from_sums_reference(sums, center, count, gamma, beta, batch_mean, batch_var, *, eps):
    """Returns `norm` in plain PyTorch. Arguments as in `norm_from_sums`."""
    offset, square = sums.sum(1) / count
    var = (square - offset.square()).clamp_(min=0)
    batch_mean.copy_(center + offset)
    torch.mul(var, count / (count - 1), out=batch_var)
    return norm_of(batch_mean, var, gamma, beta, eps)


def norm_of(mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Returns `norm`, (5, C), of a mean and a (biased) variance. In evaluation these are the running ones."""
    rstd = (var + eps).rsqrt()
    return torch.stack((mean, gamma * rstd, beta, rstd, torch.zeros_like(mean)))


@triton.jit(repr=named("batch_norm_statistics_sums"))
def sums_kernel(x, center, sums, rows, C, rows_a_part, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program sums x - center and its square over one part of the rows of (N H W, C)."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = (c < C)[None, :]
    origin = tl.load(center + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    first = part.to(tl.int64) * rows_a_part
    for offset in range(0, rows_a_part, BLOCK_ROWS):
        row = (first + offset + tl.arange(0, BLOCK_ROWS))[:, None]
        inside = (row < rows) & channel
        d = tl.where(inside, tl.load(x + row * C + c[None, :], mask=inside, other=0.0).to(tl.float32) - origin, 0.0)
        total += d
        squares += d * d
    at = part.to(tl.int64) * C + c
    tl.store(sums + at, tl.sum(total, 0), mask=c < C)
    tl.store(sums + parts * C + at, tl.sum(squares, 0), mask=c < C)


@triton.jit(repr=named("batch_norm_statistics_norm"))
def norm_kernel(
    # inputs
    sums, center, gamma, beta,
    # outputs
    norm, batch_mean, batch_var,
    # sizes, and what is compiled in
    parts, C, count, eps, BLOCK_PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_C channels."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    offset = sum_parts(sums, parts, c, C, BLOCK_PARTS, BLOCK_C) / count
    square = sum_parts(sums + parts * C, parts, c, C, BLOCK_PARTS, BLOCK_C) / count
    var = square - offset * offset
    var = tl.where(var < 0, 0.0, var)  # NaN stays
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    scale = tl.load(gamma + c, mask=inside) * rstd

    origin = tl.load(center + c, mask=inside).to(tl.float32)
    mean = origin + offset
    kept = mean - origin  # Knuth's two-sum: mean + mean_low is origin + offset without a rounding
    mean_low = (origin - (mean - kept)) + (offset - kept)
    shift = tl.load(beta + c, mask=inside) - mean_low * scale
    tl.store(norm + MEAN * C + c, mean, mask=inside)
    tl.store(norm + SCALE * C + c, scale, mask=inside)
    tl.store(norm + SHIFT * C + c, shift, mask=inside)
    tl.store(norm + RSTD * C + c, rstd, mask=inside)
    tl.store(norm + MEAN_LOW * C + c, mean_low, mask=inside)
    tl.store(batch_mean + c, mean, mask=inside)
    tl.store(batch_var + c, var * (count / (count - 1)), mask=inside)


@operator("batch_norm_statistics", mutates_args=("batch_mean", "batch_var"))
def batch_norm_statistics(
    x: Tensor, gamma: Tensor, beta: Tensor, batch_mean: Tensor, batch_var: Tensor, eps: float
) -> Tensor:
    """Returns `norm`, (5, C), fp32, of a batch (`kernels.norm_rows`). Not differentiable: `batch_norm` is.

    x: (N, C, H, W), fp16, bf16 or fp32, channels-last, with at least 2 values a channel. gamma, beta: (C,), fp32.
    batch_mean, batch_var: (C,), fp32, written: mean and unbiased variance, for the running statistics.
    Raises ValueError for other layouts, shapes, dtypes or devices.
    """
    op = "batch_norm_statistics"
    n, c, h, w = check_images(op, "x", x)
    check_statistics(op, x, n * h * w, c, gamma=gamma, beta=beta, batch_mean=batch_mean, batch_var=batch_var)
    if not (runs_triton(x.device) or state.silent):  # the reference needs memory
        return reference(x, gamma, beta, batch_mean, batch_var, eps=eps)
    config = configured_for_rows(op, x)
    parts, rows_a_part = parts_of_rows(n * h * w, c, config)
    sums = torch.empty((2, parts, c), dtype=torch.float32, device=x.device)
    tile = {name: value for name, value in config.items() if name != "PROGRAMS"}
    grid = (parts, cdiv(c, config["BLOCK_C"]))
    center = x  # its first C values are a pixel
    launch(sums_kernel, grid, x, center, sums, n * h * w, c, rows_a_part, **tile)
    return launch_norm(sums, x, n * h * w, gamma, beta, batch_mean, batch_var, eps)


@operator("norm_from_sums", mutates_args=("batch_mean", "batch_var"))
def norm_from_sums(
    sums: Tensor,
    center: Tensor,
    count: int,
    gamma: Tensor,
    beta: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    eps: float,
) -> Tensor:
    """Returns `norm`, (5, C), fp32, from the sums that the producer of x has taken: no pass over x.

    sums: (2, P, C), fp32: over P parts of the batch, sum(x - center) and sum((x - center)^2). center: (C,), fp32, near
    the mean. count: values a channel, N H W, at least 2. The rest, and what is returned, as in `batch_norm_statistics`.
    """
    op, (_, parts, c) = "norm_from_sums", sums.shape
    check_tensors(op, sums.device, gamma.dtype, sums=(sums, (2, parts, c)), center=(center, (c,)))
    check_statistics(op, sums, count, c, gamma=gamma, beta=beta, batch_mean=batch_mean, batch_var=batch_var)
    if not runs_triton(sums.device):
        return norm_from_sums_reference(sums, center, count, gamma, beta, batch_mean, batch_var, eps=eps)
    return launch_norm(sums, center, count, gamma, beta, batch_mean, batch_var, eps)


def check_statistics(op: str, x: Tensor, count: int, c: int, **tensors: Tensor) -> None:
    check_tensors(op, x.device, single_or_double(x), **{name: (t, (c,)) for name, t in tensors.items()})
    if count < 2:
        raise ValueError(f"{op}: a channel needs at least 2 values to have a variance, got {count}")


def launch_norm(sums, center, count, gamma, beta, batch_mean, batch_var, eps) -> Tensor:
    c = len(gamma)
    sums = few_parts(sums)
    norm = torch.empty((5, c), dtype=torch.float32, device=sums.device)
    grid = (cdiv(c, NORM_CONFIG["BLOCK_C"]),)
    tensors = (sums, center, gamma, beta, norm, batch_mean, batch_var)
    launch(norm_kernel, grid, *tensors, sums.shape[1], c, float(count), eps, **NORM_CONFIG)
    return norm
