"""dx, the gradient of a convolution's input; the gradient of its output may go through a BatchNorm as it is loaded.

    dx[n, c, h, w] = sum over k, r, s of weight[k, c, r, s] dy[n, k, i, j],   stride (i, j) = (h, w) + padding - (r, s)
over the r and s for which i and j are whole and inside of dy. With stride 2 the parities of h and w make four classes
of pixels, each with taps of its own: four dense problems, and no multiplication by a zero that stands between pixels.
    dy = g,   or scale g + factors[0] (y - mean) + factors[1]                                   (prologue)
    dx + a of_a, times affine[0], + affine[1]              (BatchNorm's gradient without y: `gram_gradient`)
    dx + skip, times the mask of relu, and sums of it and of its product with x - mean          (epilogue)
The skip may have every skip_stride-th pixel alone, both ways: the gradient of a 1x1 with that stride, which has no
other, is neither written nor read as zeros.
The prologue is BatchNorm's backward map (Ioffe and Szegedy 2015, arXiv:1502.03167, section 3), from
`norm_gradient`; its sums come from the epilogue of the next layer's data gradient: of g, the gradient of
the normalised, masked value, and of g (x - mean), over the raw x. The mask is taken again from x, or, where x was
joined with another, from z, the joined activation. Sums are of dx as it is stored, in one fixed order.

Bytes per fp16 value: 2 for g and, with the map, 2 for y; 2 for dx; and 2 for each of a, skip, x, z and branch there is.

What is wasted is as in `convolution`; a stem with few channels takes no short cut here, as images need no gradient.
"""

from collections.abc import Sequence
from functools import cache
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import (
    check_images,
    check_like,
    check_tensors,
    check_together,
    check_weight,
    empty_images,
    single_or_double,
)
from kernels.configurations import SMS, Configuration, cdiv
from kernels.conv_shape import (
    IMAGES,
    TILE,
    ConvShape,
    box_sizes,
    by_tma,
    configured_for,
    conv_shape,
    fusion_of,
    images_by_tma,
    launch_options,
    tile_of,
    two_programs,
)
from kernels.implementation import runs_triton
from kernels.launch import launch
from kernels.norm_rows import (
    MEAN,
    load_row,
    normalise,
    normalised,
    output_gradient,
    sums_reference,
    through_batch_norm,
)
from kernels.operators import named, operator
from kernels.partial_sums import empty_sums, store_sums
from kernels.tiles import channels_of_groups, corner, load, load_sparse, locate, multiply_add, relaid, tiles_of_rows


def reference(
    g, weight, size, stride, padding, groups, y, norm, factors,
    skip, z, x, x_norm, branch, branch_norm, a, of_a, affine, skip_stride,
):  # fmt: skip
    """Returns dx and sums in plain PyTorch; the sums have one part. Arguments as in `convolution_data_gradient`."""
    wide = single_or_double(g)
    dy, weight = output_gradient(g, y, norm, factors).to(wide), weight.to(wide)
    like = dy.new_empty(1).expand(g.shape[0], weight.shape[1] * groups, *size)
    how = (stride, padding, [1, 1], False, [0, 0], groups, [True, False, False])
    dx = torch.ops.aten.convolution_backward(dy, like, weight, None, *how)[0]
    if a is not None:
        at = slice(None), slice(None), slice(None, None, stride[0]), slice(None, None, stride[1])
        of_rows = F.conv2d(a[at].to(wide), of_a.T.to(wide)[:, :, None, None])
        dx[at] = (dx[at] + of_rows) * affine[0].view(-1, 1, 1) + affine[1].view(-1, 1, 1)
    if skip is not None:
        dx[:, :, ::skip_stride, ::skip_stride] += skip
    dx = dx.to(g.dtype, memory_format=torch.channels_last)
    if z is None and x is not None and x_norm is not None:
        z = normalise(x, x_norm, None, False)
    if z is not None:
        dx = torch.ops.aten.threshold_backward(dx, z, 0)
    if z is not None and x is None:
        sums = torch.stack((dx.to(wide).sum((0, 2, 3)), dx.new_zeros(dx.shape[1], dtype=wide))).unsqueeze(1)
        return dx, sums, sums.new_empty(0)
    sums, branch_sums = (
        torch.empty(0, dtype=wide, device=g.device)
        if raw is None or of_raw is None
        else sums_reference(dx, raw, of_raw)
        for raw, of_raw in ((x, x_norm), (branch, branch_norm))
    )
    return dx, sums, branch_sums


@triton.jit
def times_centered(g, x, norm, c, known, C):
    """Returns g (x - mean), of which BatchNorm's gradient needs the sum."""
    return g * (x.to(tl.float32) - load_row(norm, MEAN, c, known, C)[None, :])


@triton.jit(
    do_not_specialize=["N", "tiles"], repr=named("convolution_data_gradient", *TILE, "y", "skip", "z", "branch", "a")
)
def kernel(
    # inputs
    g, weight,
    # prologue
    y, norm, factors,
    # epilogue
    skip, z, x, x_norm, branch, branch_norm,
    # a second product, and what both go through
    a, of_a, affine,
    # outputs
    dx, sums, branch_sums,
    # sizes
    tiles, N,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    # descriptors of tiles
    g_tiles, y_tiles, weight_tiles, a_tiles, of_a_tiles,
    # geometry
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    GROUP_OUT: tl.constexpr, GROUP_IN: tl.constexpr,
    SKIP_STRIDE: tl.constexpr,
    # tiles
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    PERSISTENT: tl.constexpr = 0,
):  # fmt: skip
    """One program computes tiles of BLOCK_ROWS pixels of a class x BLOCK_OUT channels of dx; neighbours share rows."""
    SAME: tl.constexpr = R * S * STRIDE_H * STRIDE_W == 1 and PADDING_H + PADDING_W == 0  # a row of dx is one of g
    FORMED: tl.constexpr = norm is not None or BOX_H * BOX_W > 1
    OF_IMAGES: tl.constexpr = BOX_H * BOX_W == 1
    blocks = tl.cdiv(C, BLOCK_OUT)
    # The class has pixels (first_h + STRIDE_H i, first_w + STRIDE_W j), and taps r = first_r + STRIDE_H q, s likewise.
    first_h, first_w = tl.program_id(1) // STRIDE_W, tl.program_id(1) % STRIDE_W
    height = tl.maximum(tl.cdiv(H - first_h, STRIDE_H), 1)
    width = tl.maximum(tl.cdiv(W - first_w, STRIDE_W), 1)
    first_r, first_s = (first_h + PADDING_H) % STRIDE_H, (first_w + PADDING_W) % STRIDE_W
    first_i, first_j = (first_h + PADDING_H) // STRIDE_H, (first_w + PADDING_W) // STRIDE_W
    taps_h = (R - first_r + STRIDE_H - 1) // STRIDE_H
    taps_w = (S - first_s + STRIDE_W - 1) // STRIDE_W
    EMPTY: tl.constexpr = R < STRIDE_H or S < STRIDE_W  # there are classes without a tap
    taps = taps_h * taps_w
    rows = height.to(tl.int64) * width * N
    # Programs that take several tiles load for the next while they store one.
    turns = tl.cdiv(tiles * blocks - tl.program_id(0), PERSISTENT) if PERSISTENT else 1
    for turn in tl.range(turns, flatten=True):
        program = tl.program_id(0) + turn * PERSISTENT

        # Which channels and pixels of dx, and where they and their pixels of g begin.
        tile, c0 = program // blocks, program % blocks * BLOCK_OUT
        c = c0 + tl.arange(0, BLOCK_OUT)
        known = c < C
        lowest, span = channels_of_groups(c0, BLOCK_OUT, C, K, GROUP_IN, GROUP_OUT)
        steps = tl.cdiv(span, BLOCK_IN)  # per tap
        of_group = GROUP_IN if GROUP_IN else C
        column = c - c // GROUP_IN * GROUP_IN if GROUP_IN else c  # as %, but known to be contiguous
        if SAME:
            first = tile.to(tl.int64) * BLOCK_ROWS
            exists = tl.arange(0, BLOCK_ROWS) < rows - first
            g_tile, g_row = first * K, tl.arange(0, BLOCK_ROWS) * K
            dx_tile, dx_row = first * C, tl.arange(0, BLOCK_ROWS) * C
        else:
            image, n, i, j, exists = locate(tile, rows, height, width, BLOCK_ROWS, BOX_H, BOX_W)
            exists &= (first_h < H) & (first_w < W)
            h, w = first_h + i * STRIDE_H, first_w + j * STRIDE_W
            dx_tile, dx_row = image * H * W * C, ((n * H + h) * W + w) * C
            i += first_i
            j += first_j
            g_tile, g_row = image * OH * OW * K, ((n * OH + i) * OW + j) * K
        box, top, left = corner(tile, height, width, BLOCK_ROWS, BOX_H, BOX_W)

        # Products over taps and channels; the prologue forms dy as g is loaded.
        result = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for step in range(tl.maximum(taps * steps, 1)):  # never none, or ptxas makes wgmma wait for each other
            tap = step // steps
            start = (step - tap * steps) * BLOCK_IN
            if EMPTY:
                start = tl.where(taps > 0, start, K)  # a step of channels that are not there, which adds nothing
            k = lowest + start + tl.arange(0, BLOCK_IN)
            channel = k < K
            inside = exists[:, None] & channel[None, :]
            q = tap // (tl.maximum(taps_w, 1) if EMPTY else taps_w)
            p = tap - q * taps_w
            if not SAME:
                inside &= ((i - q >= 0) & (i - q < OH) & (j - p >= 0) & (j - p < OW))[:, None]
            at = (g_row - (q * OW + p) * K)[:, None] + k[None, :]
            top_q, left_p = top + first_i - q, left + first_j - p
            dy = load(g, g_tiles, g_tile + at, inside, box, top_q, left_p, start, OF_IMAGES)
            if norm is not None:
                value = None
                if y is not None:
                    value = load(y, y_tiles, g_tile + at, inside, box, top_q, left_p, start, OF_IMAGES)
                dy = through_batch_norm(dy, value, norm, factors, inside, k, channel, K).to(g.dtype.element_ty)
            r, s = first_r + q * STRIDE_H, first_s + p * STRIDE_W
            weighted = channel[:, None] & known[None, :]
            if GROUP_IN:
                weighted &= (k // GROUP_OUT)[:, None] == (c // GROUP_IN)[None, :]
            at = (k * R * S + (r * S + s))[:, None] * of_group + column[None, :]
            b = load(weight, weight_tiles, at, weighted, start, r, s, c0)
            result = multiply_add(dy, b, result, FORMED)

        # Products over the channels of a, at the pixels that have a tap, and what both go through.
        if a is not None:
            for step in range(tl.maximum(tl.cdiv(C, BLOCK_IN), 1)):
                start = step * BLOCK_IN
                d = start + tl.arange(0, BLOCK_IN)
                channel = (d < C) & (taps > 0)
                at = dx_row[:, None] + d[None, :]
                value = load(a, a_tiles, dx_tile + at, exists[:, None] & channel[None, :], box, top, left, start)
                at, weighted = d[:, None] * C + c[None, :], channel[:, None] & known[None, :]
                result = multiply_add(value, load(of_a, of_a_tiles, at, weighted, start, 0, 0, c0), result, FORMED)
            result *= load_row(affine, 0, c, known, C)[None, :]
            result += tl.where(taps > 0, load_row(affine, 1, c, known, C), 0.0)[None, :]

        # The epilogue. Without strides and boxes the pixels of dx follow each other, whatever the taps.
        if STRIDE_H * STRIDE_W == 1 and BOX_W == 0:
            first = tile.to(tl.int64) * BLOCK_ROWS
            exists = tl.arange(0, BLOCK_ROWS) < tl.minimum(rows - first, BLOCK_ROWS).to(tl.int32)
            dx_tile, dx_row = first * C, tl.arange(0, BLOCK_ROWS) * C
        at = dx_row[:, None] + c[None, :]
        inside = exists[:, None] & known[None, :]
        if skip is not None and SKIP_STRIDE == 1:
            result += tl.load(skip + dx_tile + at, mask=inside, other=0.0).to(tl.float32)
        elif skip is not None:
            image, n, i, j, _ = locate(tile, rows, height, width, BLOCK_ROWS, BOX_H, BOX_W)
            h, w = first_h + i * STRIDE_H, first_w + j * STRIDE_W
            result += load_sparse(skip, SKIP_STRIDE, image, n, h, w, c, inside, H, W, C)
        if z is None and x is None and branch is None:
            tl.store(dx + dx_tile + at, result.to(dx.dtype.element_ty), mask=inside)
        else:
            raw = tl.load(x + dx_tile + at, mask=inside, other=0.0) if x is not None else None
            if z is not None:
                joined = tl.load(z + dx_tile + at, mask=inside, other=0.0)
            if z is None and (a is not None or BOX_W > 0):
                result += 0.0  # as in `convolution`: ptxas would serialise wgmma
                result = tl.where(exists[:, None], result, 0.0)  # as rows that are not there are without these
            gradient = relaid(result.to(dx.dtype.element_ty)).to(tl.float32)
            if z is not None:
                gradient = tl.where(joined <= 0, 0.0, gradient)  # a NaN lets the gradient pass
            elif x is not None:
                gradient = tl.where(normalised(raw, x_norm, c, known, C) <= 0, 0.0, gradient)
            products = times_centered(gradient, raw, x_norm, c, known, C) if x is not None else None
            tl.store(dx + dx_tile + at, gradient.to(dx.dtype.element_ty), mask=inside)
            part = (tl.program_id(1) * tiles + tile).to(tl.int64)
            parts = (tl.num_programs(1) * tiles).to(tl.int64)
            if x is not None or z is not None:
                store_sums(gradient, products, sums, part, parts, c, known, C)
            if branch is not None:
                other = tl.load(branch + dx_tile + at, mask=inside, other=0.0)
                products = times_centered(gradient, other, branch_norm, c, known, C)
                store_sums(gradient, products, branch_sums, part, parts, c, known, C)


@cache
def computed(shape: ConvShape, fusion: str, element_size: int, gpu: int) -> Configuration:
    """Returns tiles of 128 x 128 x 64 for 8 warps, or x 32 with a prologue, or with a second product.

    With these and the epilogue a program has the registers of an SM.
    Two programs fit where tiles have 64 columns, without these, and of groups, where tiles are 128 x 32 x 32; and where
    TMA loads images, for several taps.
    Where TMA can load, programs of 4 warps are so small that several fit: then one waits for its epilogue's operands as
    another multiplies.
    """
    if by_tma(shape, element_size, gpu):
        return computed_for_tma(shape, fusion.split("+"))
    fused = {*fusion.split("+")}
    if images_by_tma(shape, element_size, gpu) and not {"norm", "a"} & fused:
        tile = {"BLOCK_ROWS": IMAGES, "BLOCK_OUT": tile_of(shape.c, 128), "BLOCK_IN": tile_of(shape.k, 64)}
        warps = 8 if tile["BLOCK_OUT"] > 64 else 4
        return tile | {"TMA": 1, "BOX_H": 1, "BOX_W": 1, "num_warps": warps, "num_stages": 3, "PERSISTENT": 0}
    deep = 64 if not {"norm", "a"} & fused and element_size == 2 and shape.groups == 1 else 32
    config = {
        "BLOCK_ROWS": 128,
        "BLOCK_OUT": tile_of(shape.c, 128 if shape.groups == 1 else 32),
        "BLOCK_IN": tile_of(shape.k, deep),
        "TMA": 0,
        "num_warps": 8,
        "num_stages": 3,
    }
    config |= {"PERSISTENT": 0} if shape.pointwise else box_sizes(shape, 128, *size_of_class(shape))
    ragged = shape.c % 128 + shape.k % 64 > 0  # with masks, or a skip, reading x takes more than 128 registers
    fits = shape.groups > 1 or (deep == 64 and ("x" not in fused or not (ragged or "skip" in fused)))
    return config | (two_programs(element_size, gpu) if fits else {})


def computed_for_tma(shape: ConvShape, fused: list[str]) -> Configuration:
    """Returns tiles of 64 x 64 x 64, wider where the map of g is worth sharing; loaded by pointers where k is small.

    With map and mask, programs of 2 warps are best, though wgmma takes 4 (1.35 times, H100, k of 128 and 256). Where
    nothing was measured, of deep layers that read little else, wider tiles read less from the L2 cache.
    """
    config = {"BLOCK_ROWS": 64, "BLOCK_OUT": tile_of(shape.c, 64), "BLOCK_IN": tile_of(shape.k, 64), "TMA": 1}
    config |= {"num_warps": 4, "num_stages": 3, "PERSISTENT": 0}
    if "a" in fused and shape.k >= 1024:
        return config | {"BLOCK_ROWS": 128, "BLOCK_OUT": tile_of(shape.c, 128), "num_warps": 8, "maxnreg": 128}
    if fused == ["a"] and shape.c >= 256:
        return config | {"BLOCK_ROWS": 128, "BLOCK_OUT": tile_of(shape.c, 128), "PERSISTENT": 2 * SMS}
    if "a" in fused:
        return config | {"BLOCK_ROWS": 128}
    if not {"norm", "a", "x"} & {*fused} and shape.k >= 256:
        return config | {"BLOCK_OUT": tile_of(shape.c, 128)}
    if "norm" not in fused:
        return config | {"num_stages": 2 if {"z", "x"} <= {*fused} or shape.k < 256 else 3}
    if "z" in fused and "branch" not in fused and shape.k >= 128:
        tile = {"BLOCK_ROWS": 32, "BLOCK_OUT": tile_of(shape.c, 128), "BLOCK_IN": tile_of(shape.k, 32)}
        return config | tile | {"num_warps": 2}
    if shape.k <= 128:
        stages = 1 if "z" in fused and shape.k <= 64 else 3
        return config | {"BLOCK_IN": tile_of(shape.k, 32), "TMA": 0, "num_stages": stages}
    return config | {"BLOCK_OUT": tile_of(shape.c, 128)}


def classes_and_tiles(shape: ConvShape, config: Configuration) -> tuple[int, int]:
    """Returns the classes of pixels, and the tiles of rows of the largest."""
    return prod(shape.stride), tiles_of_rows(shape.n, *size_of_class(shape), config)


def size_of_class(shape: ConvShape) -> tuple[int, int]:
    """Returns height and width of the largest class."""
    return cdiv(shape.h, shape.stride[0]), cdiv(shape.w, shape.stride[1])


@operator("convolution_data_gradient")
def convolution_data_gradient(
    g: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int = 1,
    y: Tensor | None = None,
    norm: Tensor | None = None,
    factors: Tensor | None = None,
    skip: Tensor | None = None,
    z: Tensor | None = None,
    x: Tensor | None = None,
    x_norm: Tensor | None = None,
    branch: Tensor | None = None,
    branch_norm: Tensor | None = None,
    a: Tensor | None = None,
    of_a: Tensor | None = None,
    affine: Tensor | None = None,
    skip_stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, sums, branch_sums; sums without x, and branch_sums without branch, are empty.

    g: (N, K, OH, OW), fp16, bf16 or fp32, channels-last. weight: (K, C / groups, R, S), like g, channels-last.
    size: H and W of dx. stride, padding: of H and W.
    Prologue. norm: (5, K), fp32, of the BatchNorm behind this convolution: dy = scale g. With factors, (2, K), of
    `norm_gradient`, and y, the raw output: dy = scale g + factors[0] (y - mean) + factors[1].
    Epilogue, in this order. skip: like dx, or like every skip_stride-th of its pixels, added to those. z: like dx; the
    gradient is 0 where z is 0 or below. x, x_norm: the raw input, like dx, and (5, C): without z the mask is that of
    its normalised value; sums, (2, P, C), of dx and of dx (x - mean), over P parts; without x the latter are 0. branch,
    branch_norm: likewise for branch_sums, where z joined x with another raw tensor.
    Before it, for a weight of 1 x 1 without padding. a: like dx. of_a: (C, C), like g. affine: (2, C), fp32. All three
    from `gram_gradient`: (dx + a of_a) affine[0] + affine[1], at the pixels that the convolution read.
    Raises ValueError for other layouts, shapes, dtypes or devices.
    """
    op = "convolution_data_gradient"
    check_images(op, "g", g)
    check_weight(op, "weight", weight, (g.dtype,), g.device)
    shape = conv_shape(op, (g.shape[0], weight.shape[1] * groups, size[0], size[1]), weight, stride, padding, groups)
    if g.shape != shape.output:
        raise ValueError(f"{op}: of that size, g must be {shape.output}, got {tuple(g.shape)}")
    check_like(op, g, y=y)
    rows = {"norm": (norm, (5, shape.k)), "factors": (factors, (2, shape.k))}
    rows |= {"x_norm": (x_norm, (5, shape.c)), "branch_norm": (branch_norm, (5, shape.c))}
    check_tensors(op, g.device, single_or_double(g), **rows)
    check_together(op, y=y, factors=factors)
    check_together(op, x=x, x_norm=x_norm)
    check_together(op, branch=branch, branch_norm=branch_norm)
    check_together(op, a=a, of_a=of_a, affine=affine)
    check_tensors(op, g.device, single_or_double(g), affine=(affine, (2, shape.c)))
    check_tensors(op, g.device, g.dtype, of_a=(of_a, (shape.c, shape.c)))
    if a is not None and (shape.r * shape.s > 1 or any(shape.padding) or groups > 1):
        raise ValueError(f"{op}: a is for a weight of 1 x 1 without padding and groups; got {shape.key}")
    if factors is not None and norm is None:
        raise ValueError(f"{op}: factors need norm")
    dx = empty_images(g, shape.input)
    check_like(op, dx, z=z, x=x, branch=branch, a=a)
    check_like(op, dx[:, :, ::skip_stride, ::skip_stride], skip=skip)
    prologue, epilogue = (y, norm, factors), (skip, z, x, x_norm, branch, branch_norm, a, of_a, affine)
    if not runs_triton(g.device):
        return reference(g, weight, size, stride, padding, groups, *prologue, *epilogue, skip_stride)
    fusion = fusion_of(norm=norm, y=y, skip=skip, z=z, x=x, branch=branch, a=a)
    config = configured_for(op, g, shape, fusion, computed)
    classes, tiles = classes_and_tiles(shape, config)
    summed = z if x is None else x, branch
    sums, branch_sums = (empty_sums(g, tensor, classes * tiles, shape.c) for tensor in summed)
    matrices = {
        "g": (g, "BLOCK_ROWS", "BLOCK_IN"),
        "y": (y, "BLOCK_ROWS", "BLOCK_IN"),
        "weight": (weight, "BLOCK_IN", "BLOCK_OUT"),
        "a": (a if shape.pointwise else None, "BLOCK_ROWS", "BLOCK_IN"),
        "of_a": (None if of_a is None else of_a.view(*of_a.shape, 1, 1), "BLOCK_IN", "BLOCK_OUT"),
    }
    options = launch_options(op, shape, config, **matrices)
    programs = tiles * cdiv(shape.c, config["BLOCK_OUT"])
    launch(
        kernel,
        (min(programs, config.get("PERSISTENT") or programs), classes),
        *(g, weight, *prologue, *epilogue, dx, sums, branch_sums, tiles),
        *(shape.n, shape.c, shape.h, shape.w, shape.k, shape.oh, shape.ow),
        **shape.constants,
        SKIP_STRIDE=skip_stride,
        **options,
    )
    return dx, sums, branch_sums
