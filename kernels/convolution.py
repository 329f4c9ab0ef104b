"""y = weight * a, a convolution, where a may be a BatchNorm, join and ReLU that are applied as x is loaded.

    y[n, k, i, j] = sum over c, r, s of weight[k, c, r, s] a[n, c, stride i + r - padding, stride j + s - padding]
    a = x,   or relu((x - mean) scale + shift),   or relu((x - mean) scale + shift + residual)     (prologue)
    y may become relu(y scale + shift + add), or bring sum(y - center) and sum((y - center)^2)     (epilogue)
An implicit matrix product (Chetlur et al. 2014, arXiv:1410.0759): rows are the pixels of y, the sum runs over taps, and
within a tap over channels, which lie side by side. Products are summed in fp32. Outside of the image a is 0, not the
normalised 0. A residual may itself be raw: then it comes with its own norm. With a residual a is written, once, as
it is what the next join and the weight's gradient need.

The sums are those of y as it is stored, by channel, over parts of the rows: what `norm_from_sums` takes, so that
BatchNorm needs no pass over y. All of it is in one fixed order.

Bytes per fp16 value: 2 for x, 2 for y; a residual adds 2 read and 2 written per value of x. Each tile of channels of y
reads x again, from the L2 cache, as tiles of the same rows run side by side; so does each tap.

What is wasted: channels are padded to BLOCK_IN and BLOCK_OUT, by masks. Where x has 8 channels or fewer, the taps of a
row count as one with S C channels: 7 x 4 of 32 are used in a stem padded to 4, 7 x 8 of 64 in one padded to 8. Groups
narrower than a tile share it: of groups of width 4, a tile of 32 x 32 multiplies 7 zeros for each weight, while bytes
are moved once and side by side; what is not finite in one group reaches those that share its tile.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.checks import (
    check_images,
    check_like,
    check_tensors,
    check_weight,
    empty_images,
    pitch_of,
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
from kernels.norm_rows import activation, normalised
from kernels.operators import named, operator
from kernels.partial_sums import empty_sums, store_sums
from kernels.tiles import channels_of_groups, corner, keep, load, locate, multiply_add, relaid, tiles_of_rows


def reference(x, weight, stride, padding, groups, norm, residual, residual_norm, center, scale, shift, add, relu):
    """Returns y, z, sums in plain PyTorch; the sums have one part. Arguments as in `convolution`."""
    wide = single_or_double(x)  # in halves PyTorch's convolutions sum in halves on some CPUs
    a = activation(x, norm, residual, residual_norm)
    y = F.conv2d(a.to(wide), weight.to(wide), None, stride, padding, 1, groups)
    y = y if scale is None else y * scale.view(-1, 1, 1)
    y = y if shift is None else y + shift.view(-1, 1, 1)
    y = y if add is None else y + add
    y = (y.relu_() if relu else y).to(x.dtype, memory_format=torch.channels_last)
    sums = torch.empty(0, dtype=wide, device=x.device)
    if center is not None:
        d = y.to(wide) - center.view(-1, 1, 1)
        sums = torch.stack((d.sum((0, 2, 3)), d.square_().sum((0, 2, 3)))).unsqueeze(1)
    return y, a if residual is not None else x.new_empty(0), sums


@triton.jit(
    do_not_specialize=["rows", "parts"], repr=named("convolution", *TILE, "norm", "residual", "center", "scale")
)
def kernel(
    # inputs
    x, weight,
    # prologue
    norm, residual, residual_norm, joined,
    # epilogue
    center, scale, shift, add,
    # outputs
    y, sums,
    # sizes
    rows, parts,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    K: tl.constexpr, PITCH: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    # descriptors of tiles
    x_tiles, weight_tiles,
    # geometry
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    GROUP_OUT: tl.constexpr, GROUP_IN: tl.constexpr, NARROW: tl.constexpr,
    # what else is compiled in
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    PERSISTENT: tl.constexpr = 0,
):  # fmt: skip
    """One program computes tiles of BLOCK_ROWS rows x BLOCK_OUT channels of y; neighbours have the same rows.

    PITCH: from a pixel of y to the next; K, unless y is a slice of channels.
    """
    SAME: tl.constexpr = R * S * STRIDE_H * STRIDE_W == 1 and PADDING_H + PADDING_W == 0  # a row of y is one of x
    FORMED: tl.constexpr = norm is not None or BOX_H * BOX_W > 1
    OF_IMAGES: tl.constexpr = BOX_H * BOX_W == 1
    STEP_H: tl.constexpr = STRIDE_H if OF_IMAGES else 1  # else the descriptor has the stride
    STEP_W: tl.constexpr = STRIDE_W if OF_IMAGES else 1
    TAPS_W: tl.constexpr = 1 if NARROW else S
    RUN: tl.constexpr = S if NARROW else 1  # the taps side by side that count as one
    channels = NARROW if NARROW else C
    blocks = tl.cdiv(K, BLOCK_OUT)
    # Programs that take several tiles load for the next while they store one.
    turns = tl.cdiv(parts * blocks - tl.program_id(0), PERSISTENT) if PERSISTENT else 1
    for turn in tl.range(turns, flatten=True):
        tile = tl.program_id(0) + turn * PERSISTENT

        # Which channels and pixels of y, and where they and their pixels of x begin.
        block, part = tile % blocks, tile // blocks
        k = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        known = k < K
        lowest, span = channels_of_groups(block * BLOCK_OUT, BLOCK_OUT, K, RUN * channels, GROUP_OUT, GROUP_IN)
        steps = tl.cdiv(span, BLOCK_IN)  # per tap
        of_group = GROUP_IN if GROUP_IN else RUN * channels
        weight_row = k * (R * TAPS_W * of_group)
        if GROUP_IN:
            weight_row -= k // GROUP_OUT * GROUP_IN
        first = part.to(tl.int64) * BLOCK_ROWS
        y_tile, y_row = first * PITCH, tl.arange(0, BLOCK_ROWS) * PITCH
        if SAME:
            exists = tl.arange(0, BLOCK_ROWS) < rows - first
            x_tile, x_row = first * channels, tl.arange(0, BLOCK_ROWS) * channels
        else:
            image, n, i, j, exists = locate(part, rows, OH, OW, BLOCK_ROWS, BOX_H, BOX_W)
            h, w = i * STRIDE_H - PADDING_H, j * STRIDE_W - PADDING_W
            x_tile, x_row = image * H * W * channels, ((n * H + h) * W + w) * channels
            if BOX_W:
                if PITCH > K:
                    n = n.to(tl.int64)  # what 32 bits do not reach across is refused for x and K alone
                y_tile, y_row = image * OH * OW * PITCH, ((n * OH + i) * OW + j) * PITCH
        box, top, left = corner(part, OH, OW, BLOCK_ROWS, BOX_H, BOX_W)

        # Products over taps and channels; the prologue forms the activation as x is loaded.
        result = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
        for step in range(tl.maximum(R * TAPS_W * steps, 1)):  # said, or ptxas makes wgmma wait for each other
            tap = step // steps if R * TAPS_W > 1 else 0
            start = (step - tap * steps) * BLOCK_IN
            run = lowest + start + tl.arange(0, BLOCK_IN)
            channel = run < RUN * channels
            r, s = tap // TAPS_W if R > 1 else 0, tap % TAPS_W  # a constant 0 takes fewer registers
            pixel, c = exists[:, None], run
            if NARROW:
                c = run % NARROW
                s_of_run = w[:, None] + (run // NARROW)[None, :]
                pixel &= (h + r >= 0)[:, None] & (h + r < H)[:, None] & (s_of_run >= 0) & (s_of_run < W)
            elif not SAME:
                pixel &= ((h + r >= 0) & (h + r < H) & (w + s >= 0) & (w + s < W))[:, None]
            inside = pixel & channel[None, :]
            at = (x_row + (r * W + s) * channels)[:, None] + run[None, :]
            h_tap, w_tap = top * STEP_H + r - PADDING_H, left * STEP_W + s - PADDING_W
            a = load(x, x_tiles, x_tile + at, inside, box, h_tap, w_tap, start, OF_IMAGES)
            if norm is not None:
                value = normalised(a, norm, c, channel, C)
                if residual is not None:
                    skip = tl.load(residual + x_tile + at, mask=inside, other=0.0)
                    if residual_norm is not None:
                        skip = normalised(skip, residual_norm, c, channel, C)
                    value += skip.to(tl.float32)
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
                a = keep(value.to(x.dtype.element_ty), pixel)
                if joined is not None:
                    tl.store(joined + x_tile + at, a, mask=inside & (block == 0))
            weighted = known[:, None] & channel[None, :]
            if GROUP_IN:
                weighted &= (k // GROUP_OUT)[:, None] == (run // GROUP_IN)[None, :]
            at = (weight_row + tap * of_group)[:, None] + run[None, :]
            b = load(weight, weight_tiles, at, weighted, block * BLOCK_OUT, r, s, start)
            result = multiply_add(a, tl.trans(b), result, FORMED)

        # The epilogue. Without boxes the pixels of y follow each other, whatever the taps.
        if BOX_W == 0:
            exists = tl.arange(0, BLOCK_ROWS) < tl.minimum(rows - first, BLOCK_ROWS).to(tl.int32)
        at = y_row[:, None] + k[None, :]
        inside = exists[:, None] & known[None, :]
        if scale is not None:
            result *= tl.load(scale + k, mask=known, other=0.0)[None, :]
        if shift is not None:
            result += tl.load(shift + k, mask=known, other=0.0)[None, :]
        if add is not None:
            result += tl.load(add + y_tile + at, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            result = tl.maximum(result, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if center is not None:
            result += 0.0  # in registers of its own, it does not make ptxas serialise wgmma; -0 becomes 0
            if shift is not None or BOX_W > 0:
                result = tl.where(exists[:, None], result, 0.0)  # as rows that are not there are without these
        stored = result.to(y.dtype.element_ty)
        tl.store(y + y_tile + at, stored, mask=inside)
        if center is not None:
            origin = tl.load(center + k, mask=known, other=0.0)[None, :] * exists.to(tl.float32)[:, None]
            d = relaid(stored).to(tl.float32) - origin
            store_sums(d, d * d, sums, part.to(tl.int64), parts, k, known, K)


@cache
def computed(shape: ConvShape, fusion: str, element_size: int, gpu: int) -> Configuration:
    """Returns tiles of 128 x 128 x 64, or x 32 with a prologue, whose rows of norm take registers.

    So two programs fit an SM. Of groups 128 x 32 x 32: fewer zeros, and a channel is read by one program. Where TMA
    loads pixels as they follow each other, tiles are 64 x 128 x 64 for 4 warps, or 2 where most is read, so that two to
    four programs hide each other's waits, and of deep layers 128 x 128 x 64, one after the other in a program; where it
    loads images, for several taps, 128 x 128 x 64, or 128 x 256 x 64, which reads less.
    """
    if by_tma(shape, element_size, gpu):
        many, reads = min(shape.c, shape.k) >= 256, shape.k < shape.c
        rows, columns, warps, programs = 64, 128, 4, 0
        if "residual" in fusion and many:  # joined once, not for each 128 columns
            rows, columns, warps = 128, 256, 8
        elif fusion in ("alone", "sums") and (many or not reads):
            rows, programs = 128 if many else 64, 2 * SMS
        elif fusion == "sums":
            warps = 2
        tile = {"BLOCK_ROWS": rows, "BLOCK_OUT": tile_of(shape.k, columns), "BLOCK_IN": tile_of(shape.c, 64)}
        return tile | {"TMA": 1, "num_warps": warps, "num_stages": 3, "PERSISTENT": programs}
    if images_by_tma(shape, element_size, gpu) and "norm" not in fusion:
        columns, warps = (256, 8) if shape.k % 256 == 0 else (128, 4)
        tile = {"BLOCK_ROWS": IMAGES, "BLOCK_OUT": tile_of(shape.k, columns), "BLOCK_IN": tile_of(shape.c, 64)}
        return tile | {"TMA": 1, "BOX_H": 1, "BOX_W": 1, "num_warps": warps, "num_stages": 3, "PERSISTENT": 0}
    deep = 32 if "norm" in fusion or element_size > 2 else 64
    config = {
        "BLOCK_ROWS": 128,
        "BLOCK_OUT": tile_of(shape.k, 128 if shape.groups == 1 else 32),
        "BLOCK_IN": tile_of(shape.run, deep if shape.groups == 1 else 32),
        "TMA": 0,
        "num_warps": 8,
        "num_stages": 3,
    }
    if shape.narrow and gpu == 9 and element_size == 2:
        config |= {"num_warps": 4, "num_stages": 1}  # so many programs fit that each may wait for its loads
    config |= {"PERSISTENT": 0} if shape.pointwise else box_sizes(shape, 128, shape.oh, shape.ow)
    return config | (two_programs(element_size, gpu) if "norm" in fusion else {})


@operator("convolution", mutates_args=("out",))
def convolution(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int = 1,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    residual_norm: Tensor | None = None,
    center: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    add: Tensor | None = None,
    relu: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, z, sums: z is x + residual behind its relu, sums those about `center`; without these they are empty.

    x: (N, C, H, W), fp16, bf16 or fp32, channels-last. weight: (K, C / groups, R, S), like x, channels-last. stride,
    padding: of H and W.
    Prologue. norm: (5, C), fp32, of `batch_norm_statistics`: relu((x - mean) scale + shift) is convolved.
    residual: like x, added before relu, for a weight of 1 x 1 with stride 1 only. residual_norm: (5, C), if the
    residual is raw, too.
    Epilogue, in this order: y scale + shift + add, relu, and the sums of y - center and of its square. scale, shift,
    center: (K,), fp32. add: like y. sums: (2, P, K), over P parts of the rows.
    out: like y, or a slice of the channels of such a tensor: written in place of y, which is then empty. Without add.
    Not differentiable: `convolution_data_gradient` and `convolution_weight_gradient` are the gradients.
    Raises ValueError for other layouts, shapes, dtypes or devices.
    """
    shape = checked(x, weight, stride, padding, groups, norm, residual, residual_norm)
    sums_dtype, k = single_or_double(x), (shape.k,)
    check_tensors("convolution", x.device, sums_dtype, center=(center, k), scale=(scale, k), shift=(shift, k))
    if out is None:
        y = written = empty_images(x, shape.output)
        check_like("convolution", y, add=add)
    else:
        y, written = x.new_empty(0), out
        check_out(x, shape, out, add)
    if not runs_triton(x.device):
        prologue = norm, residual, residual_norm
        result, z, sums = reference(x, weight, stride, padding, groups, *prologue, center, scale, shift, add, relu)
        if out is None:
            return result, z, sums
        out.copy_(result)
        return y, z, sums
    config = configured_for(
        "convolution",
        x,
        shape,
        fusion_of(norm=norm, residual=residual, raw=residual_norm, sums=center, add=add),
        computed,
    )
    parts = tiles_of_rows(shape.n, shape.oh, shape.ow, config)
    z = x.new_empty(0) if residual is None else torch.empty_like(x)
    sums = empty_sums(x, center, parts, shape.k)
    tiles = parts * cdiv(shape.k, config["BLOCK_OUT"])
    matrices = {"x": (x, "BLOCK_ROWS", "BLOCK_IN"), "weight": (weight, "BLOCK_OUT", "BLOCK_IN")}
    options = launch_options("convolution", shape, config, **matrices)
    launch(
        kernel,
        (min(tiles, config.get("PERSISTENT") or tiles),),
        *(x, weight, norm, residual, residual_norm, None if residual is None else z),
        *(center, scale, shift, add, written, sums, shape.rows, parts),
        *(shape.c, shape.h, shape.w, shape.k, pitch_of(written), shape.oh, shape.ow),
        **shape.constants,
        NARROW=shape.narrow,
        RELU=relu,
        **options,
    )
    return y, z, sums


def check_out(x: Tensor, shape: ConvShape, out: Tensor, add: Tensor | None) -> None:
    op = "convolution"
    check_images(op, "out", out, slices=True)
    if (out.shape, out.dtype, out.device) != (shape.output, x.dtype, x.device) or add is not None:
        raise ValueError(
            f"{op}: out must be {shape.output}, {x.dtype}, on {x.device}, and there must be no add; "
            f"got {tuple(out.shape)}, {out.dtype}, on {out.device}, {'no add' if add is None else 'an add'}"
        )


def checked(x, weight, stride, padding, groups, norm, residual, residual_norm) -> ConvShape:
    """Returns the shape. Raises ValueError for a prologue that does not fit."""
    op, size = "convolution", check_images("convolution", "x", x)
    check_weight(op, "weight", weight, (x.dtype,), x.device)
    shape = conv_shape(op, size, weight, stride, padding, groups)
    rows = (5, shape.c)
    check_tensors(op, x.device, single_or_double(x), norm=(norm, rows), residual_norm=(residual_norm, rows))
    check_like(op, x, residual=residual)
    if (residual is not None and norm is None) or (residual_norm is not None and residual is None):
        raise ValueError(f"{op}: a residual needs norm, and residual_norm need a residual")
    if residual is not None and not shape.pointwise:
        raise ValueError(
            f"{op}: a residual is joined by a 1 x 1 weight with stride 1, without padding; "
            f"got {shape.r} x {shape.s}, stride {shape.stride}, padding {shape.padding}"
        )
    if residual is not None and groups > 1:
        raise ValueError(f"{op}: a residual is joined without groups, got {groups}")
    return shape
