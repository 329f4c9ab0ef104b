"""gram = a^T a and the sums of a, over all pixels, where a may be a BatchNorm and ReLU that are applied to x.

    gram[c, d] = sum over n, i, j of a[n, c, stride i, stride j] a[n, d, stride i, stride j],   gram[C, c] = sum of a[c]
    a = x,   or relu((x - mean) scale + shift), rounded, which is then written
From it follow mean and variance of any y = weight a before there is a y (`gram_norm`). That is how Ioffe and Szegedy
2015, arXiv:1502.03167, section 3.1, would normalise a whole layer's inputs; here it serves the layer behind. A matrix
product with as many terms as there are pixels, shared out to parts, as `convolution_weight_gradient` does it. It is
symmetric: a pair of blocks of channels is multiplied once. What is summed in fp32 is at least 0, so tensor cores, which
cut off, are low by at most 2^-23 of it for each 16 rows of a part.

Bytes per fp16 value: 2 for x, and 2 for a where it is written; from 129 channels on further pairs of blocks read x
again, from the L2 cache, as programs of the same rows run side by side. Parts write and read 4 per value of gram each.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import conv_shape
from kernels.checks import check_images, check_tensors, single_or_double
from kernels.configurations import SMS, Configuration, cdiv, configuration, dtype_name, next_power_of_2
from kernels.implementation import runs_triton
from kernels.launch import launch
from kernels.norm_rows import activation, normalised
from kernels.operators import named, operator
from kernels.partial_sums import store_sum
from kernels.tiles import keep, locate, multiply_add


def reference(x, stride, norm):
    """Returns a and gram in plain PyTorch. Arguments as in `gram_matrix`."""
    a = activation(x, norm)
    rows = a[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1).flatten(0, 2).to(single_or_double(x))
    gram = torch.cat((rows.T @ rows, rows.sum(0, keepdim=True)))
    return x.new_empty(0) if norm is None else a, gram


@triton.jit(do_not_specialize=["rows", "tiles_a_part"], repr=named("gram_matrix", "BLOCK_ROWS", "BLOCK", "norm"))
def kernel(
    # inputs
    x, norm,
    # outputs
    a, partial,
    # sizes
    rows, tiles_a_part, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    # geometry
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    # tiles
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One program multiplies BLOCK channels by as many, of one part of the rows; one of PAIRS pairs of such blocks."""
    pair, part = tl.program_id(0) % PAIRS, tl.program_id(0) // PAIRS
    # The pairs are (0, 0), (0, 1), (1, 1), (0, 2), ...: which has the block `right` has that number of pairs before it.
    right = 0
    for block in tl.static_range(1, PAIRS):
        right += (block * (block + 1) // 2 <= pair).to(tl.int32)
    left = pair - right * (right + 1) // 2
    c, d = left * BLOCK + tl.arange(0, BLOCK), right * BLOCK + tl.arange(0, BLOCK)

    # Products over this part's rows; a is formed as x is loaded.
    result = tl.zeros((BLOCK, BLOCK), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    start = part.to(tl.int64) * tiles_a_part
    tl.assume(tiles_a_part > 0)  # said, or ptxas makes wgmma wait for each other
    for step in range(tiles_a_part):
        first = (start + step) * BLOCK_ROWS
        if STRIDE_H * STRIDE_W == 1:
            exists = tl.arange(0, BLOCK_ROWS) < rows - first
            tile, row = first * C, tl.arange(0, BLOCK_ROWS) * C
        else:
            image, n, i, j, exists = locate((start + step).to(tl.int32), rows, OH, OW, BLOCK_ROWS, 0, 0)
            tile, row = image * H * W * C, ((n * H + i * STRIDE_H) * W + j * STRIDE_W) * C
        inside = exists[:, None] & (d < C)[None, :]
        of_right = tl.load(x + tile + (row[:, None] + d[None, :]), mask=inside, other=0.0)
        if norm is not None:
            value = tl.maximum(normalised(of_right, norm, d, d < C, C), 0.0, propagate_nan=tl.PropagateNan.ALL)
            of_right = keep(value.to(x.dtype.element_ty), exists[:, None])
            tl.store(a + tile + (row[:, None] + d[None, :]), of_right, mask=inside & (left == right))
        of_left = of_right
        if PAIRS > 1:
            inside = exists[:, None] & (c < C)[None, :]
            of_left = tl.load(x + tile + (row[:, None] + c[None, :]), mask=inside, other=0.0)
            if norm is not None:
                value = tl.maximum(normalised(of_left, norm, c, c < C, C), 0.0, propagate_nan=tl.PropagateNan.ALL)
                of_left = keep(value.to(x.dtype.element_ty), exists[:, None])
        result = multiply_add(tl.trans(of_left), of_right, result, False)
        total += tl.sum(of_right.to(tl.float32), 0)

    # Store: a block of the diagonal, with the sums, or one above it, and what it is below.
    partial += part.to(tl.int64) * ((C + 1) * C)
    tl.store(partial + c[:, None] * C + d[None, :], result, mask=(c < C)[:, None] & (d < C)[None, :])
    if PAIRS > 1:
        below = (d < C)[:, None] & (c < C)[None, :] & (left < right)
        tl.store(partial + d[:, None] * C + c[None, :], tl.trans(result), mask=below)
    tl.store(partial + C * C + d, total, mask=(d < C) & (left == right))


@cache
def computed(channels: int, of_rows: int, normal: bool, element_size: int, gpu: int) -> Configuration:
    """Returns blocks of 64 channels for 4 warps, or of 128 for 8, and so few rows that two to four programs fit an SM.

    One fits where pairs of blocks are normalised, or where so many rows on their way at a time are faster. `normal`:
    whether x is.
    """
    halves = element_size == 2
    block = min(128, max(64 if halves else 16, next_power_of_2(channels)))
    pairs = pairs_of(channels, block)
    rows, warps, programs = (64, 8, 2 * SMS) if block == 128 else (64 if normal else 128, 4, 4 * SMS)
    if halves and gpu == 9:  # as measured on a H200, 1.2 to 1.8 times as fast
        if block == 64:
            rows, warps, programs = (128, 2, 2 * SMS) if normal else (512 if of_rows >= 512 * SMS else 128, 4, SMS)
        elif pairs > 1 and (normal or channels <= 256):
            rows, warps, programs = 128, 8 if normal else 4, SMS
    options = {"maxnreg": 255} if gpu >= 10 else {}  # unasked, ptxas may stop at 128 and spill a few bytes
    if normal and block == 128 and pairs == 1:
        rows = 32
        options |= conv_shape.two_programs(element_size, gpu)
    rows //= 1 if halves else 2
    parts = min(cdiv(of_rows, rows), max(1, programs // pairs))
    config = {"BLOCK_ROWS": rows, "BLOCK": block, "PARTS": parts, "num_warps": warps, "num_stages": 3}
    return config | options


def pairs_of(channels: int, block: int) -> int:
    blocks = cdiv(channels, block)
    return blocks * (blocks + 1) // 2


@operator("gram_matrix")
def gram_matrix(x: Tensor, stride: Sequence[int], norm: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns a and gram: a is relu of the normalised x, like x, and empty without norm.

    x: (N, C, H, W), fp16, bf16 or fp32, channels-last. stride: of H and W, for x that is not normalised: the pixels
    that a 1 x 1 convolution with that stride reads are counted. norm: (5, C), fp32, of `batch_norm_statistics`.
    gram: (C + 1, C), fp32, symmetric; its last row are the sums. Not differentiable.
    Raises ValueError for other layouts, shapes, dtypes or devices.
    """
    op, (n, c, h, w) = "gram_matrix", map(int, check_images("gram_matrix", "x", x))  # a compiler's may be symbols
    check_tensors(op, x.device, single_or_double(x), norm=(norm, (5, c)))
    if len(stride) != 2 or min(stride) < 1 or (norm is not None and max(stride) > 1):
        raise ValueError(f"{op}: stride is two numbers from 1 on, (1, 1) with norm; got {tuple(stride)}")
    if not runs_triton(x.device):
        return reference(x, stride, norm)
    oh, ow = cdiv(h, stride[0]), cdiv(w, stride[1])
    rows = n * oh * ow
    own = computed(c, rows, norm is not None, x.element_size(), conv_shape.capability(x.device))
    key = f"{dtype_name(x.dtype)} C={c} NHW={rows} stride={stride[0]},{stride[1]}" + " norm" * (norm is not None)
    config = dict(configuration(op, key, x.device, own))
    pairs = pairs_of(c, config["BLOCK"])
    of_rows = cdiv(rows, config["BLOCK_ROWS"])
    tiles_a_part = cdiv(of_rows, min(config.pop("PARTS"), of_rows))
    parts = cdiv(of_rows, tiles_a_part)
    a = x.new_empty(0) if norm is None else torch.empty_like(x)
    partial = torch.empty((parts, c + 1, c), dtype=torch.float32, device=x.device)
    gram = torch.empty((c + 1, c), dtype=torch.float32, device=x.device)
    sizes = rows, tiles_a_part, c, h, w, oh, ow
    of_a = None if norm is None else a
    launch(
        kernel, (pairs * parts,), x, norm, of_a, partial, *sizes,
        STRIDE_H=stride[0], STRIDE_W=stride[1], PAIRS=pairs, **config,
    )  # fmt: skip
    store_sum(partial, gram)
    return a, gram
