"""Sums over the rows of (N H W, C), which programs share out in parts; they are always added in the same order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import single_or_double
from kernels.configurations import Configuration, cdiv
from kernels.launch import launch
from kernels.operators import named

NORM_CONFIG = {"BLOCK_PARTS": 64, "BLOCK_C": 16, "num_warps": 4}
FOLD_CONFIG = {"BLOCK_PARTS": 64, "BLOCK_C": 64, "num_warps": 4}
SUM_CONFIG = {"BLOCK_PARTS": 16, "BLOCK": 128, "num_warps": 4}
MOST_PARTS = 512  # of sums that `norm_kernel`, few programs, reads


def parts_of_rows(rows: int, channels: int, config: Configuration) -> tuple[int, int]:
    """Returns the number of parts in which the rows of (N H W, C) are shared out for a sum, and the rows of a part.

    With a tile's channels they make about config["PROGRAMS"] programs; a part is whole tiles.
    """
    wanted = cdiv(config["PROGRAMS"], cdiv(channels, config["BLOCK_C"]))
    tiles = cdiv(rows, config["BLOCK_ROWS"])
    rows_a_part = cdiv(tiles, min(wanted, tiles)) * config["BLOCK_ROWS"]
    return cdiv(rows, rows_a_part), rows_a_part


def empty_sums(x: Tensor, read: Tensor | None, parts: int, channels: int) -> Tensor:
    """Returns room for two sums a channel over `parts` parts of the rows; for none where `read` is not there."""
    size = 0 if read is None else (2, parts, channels)
    return torch.empty(size, dtype=single_or_double(x), device=x.device)


@triton.jit
def add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def store_sums(values, others, sums, part, parts, c, known, C):
    """Stores the sums of both, tiles of (rows, channels c), as a part of `sums`, (2, parts, C); without others 0."""
    if others is None:
        total = tl.sum(values, 0)
        of_others = tl.zeros_like(total)
    else:
        total, of_others = tl.reduce((values, others), 0, add_both)  # they wait for other warps together
    at = (part + tl.arange(0, 2)[None, :] * parts) * C + c[:, None]
    tl.store(sums + at, tl.join(total, of_others), mask=known[:, None])


@triton.jit
def sum_parts(sums, parts, c, C, BLOCK_PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Returns sums, (parts, C), added over the parts for the channels c, always in the same order."""
    total = tl.zeros((BLOCK_PARTS, BLOCK_C), tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        part = (first + tl.arange(0, BLOCK_PARTS))[:, None]
        total += tl.load(sums + part.to(tl.int64) * C + c[None, :], mask=(part < parts) & (c < C)[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit(repr=named("partial_sums_fold"))
def fold_kernel(sums, fewer, parts, C, BLOCK_PARTS: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program adds one of the sums, of BLOCK_C channels, over BLOCK_PARTS parts."""
    part = tl.program_id(0) * BLOCK_PARTS + tl.arange(0, BLOCK_PARTS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    which = tl.program_id(2).to(tl.int64)
    inside = (part < parts)[:, None] & (c < C)[None, :]
    value = tl.load(sums + (which * parts + part)[:, None] * C + c[None, :], mask=inside, other=0.0)
    at = (which * tl.num_programs(0) + tl.program_id(0)) * C + c
    tl.store(fewer + at, tl.sum(value, 0), mask=c < C)


@triton.jit(repr=named("partial_sums_sum"))
def sum_kernel(partial, out, parts, size, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program sums BLOCK values over the parts."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = sum_parts(partial, parts, at, size, BLOCK_PARTS, BLOCK)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < size)


def store_sum(partial: Tensor, out: Tensor) -> None:
    """Stores in `out` the sum of the parts: partial is (P, values of out), fp32."""
    grid = (cdiv(out.numel(), SUM_CONFIG["BLOCK"]),)
    launch(sum_kernel, grid, partial, out, len(partial), out.numel(), **SUM_CONFIG)


def few_parts(sums: Tensor) -> Tensor:
    """Returns the sums, (2, P, C), over fewer parts where there are so many (a convolution's tiles) that it pays."""
    _, parts, c = sums.shape
    if parts <= MOST_PARTS:
        return sums
    grid = (cdiv(parts, FOLD_CONFIG["BLOCK_PARTS"]), cdiv(c, FOLD_CONFIG["BLOCK_C"]), 2)
    fewer = torch.empty((2, grid[0], c), dtype=sums.dtype, device=sums.device)
    launch(fold_kernel, grid, sums, fewer, parts, c, **FOLD_CONFIG)
    return fewer
