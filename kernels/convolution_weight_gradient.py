"""dw, the gradient of a convolution's weight; BatchNorms may be applied to both of its operands as they are loaded.

    dw[k, c, r, s] = sum over n, i, j of dy[n, k, i, j] a[n, c, stride i + r - padding, stride j + s - padding]
    dy = g,   or scale g + factors[0] (y - mean) + factors[1]      as in `convolution_data_gradient`
    a = x,    or relu((x - mean) scale + shift), rounded            as in `convolution`; of a join, x is its result
A matrix product with as many terms as y has pixels: they are shared out to parts, whose results in fp32 are then summed
in one fixed order. The result is stored in a tensor that is there already, a slice of the gradients' buffer.

Bytes per fp16 value: 2 for x, 2 for g and, with the map, 2 for y; each tile of dw reads them again, from the L2 cache,
as tiles of the same rows run side by side. A tile may have several taps, which share dy: it is then loaded, and formed,
once for all of them. Parts write and read 4 per value of dw each: there are only as many as fill
the GPU. What is wasted is as in `convolution`. A tile that is a box reads x beyond y, times 0: what is not finite
there reaches other taps of its channel, as it does other groups that share its tile.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_images, check_like, check_tensors, check_together, check_weight, single_or_double
from kernels.configurations import SMS, Configuration, cdiv
from kernels.conv_shape import (
    TILE,
    ConvShape,
    box_sizes,
    by_tma,
    configured_for,
    conv_shape,
    fusion_of,
    images_by_tma,
    launch_options,
    most_channels_of_groups,
    tile_of,
)
from kernels.implementation import runs_triton
from kernels.launch import launch
from kernels.norm_rows import activation, normalised, output_gradient, through_batch_norm
from kernels.operators import named, operator
from kernels.partial_sums import store_sum
from kernels.tiles import channels_of_groups, corner, keep, load, locate, multiply_add, tiles_of_rows


def reference(g, x, out, stride, padding, groups, y, norm, factors, x_norm):
    """Computes dw in plain PyTorch. Arguments as in `convolution_weight_gradient`."""
    wide = single_or_double(g)
    dy, a = output_gradient(g, y, norm, factors).to(wide), activation(x, x_norm).to(wide)
    how = (stride, padding, [1, 1], False, [0, 0], groups, [False, True, False])
    dw = torch.ops.aten.convolution_backward(dy, a, dy.new_empty(1).expand(out.shape), None, *how)[1]
    out.copy_(dw)


@triton.jit(do_not_specialize=["rows", "tiles_a_part"], repr=named("convolution_weight_gradient", *TILE, "y", "x_norm"))
def kernel(
    # inputs, and what dy and the activation are formed with
    g, x, y, norm, factors, x_norm,
    # output
    dw,
    # sizes
    rows, tiles_a_part, tiles_of_run,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, K: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    # descriptors of tiles
    g_tiles, y_tiles, x_tiles,
    # geometry
    R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    GROUP_OUT: tl.constexpr, GROUP_IN: tl.constexpr, NARROW: tl.constexpr,
    # tiles
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr,
    TAPS: tl.constexpr = 1,
):  # fmt: skip
    """One program sums BLOCK_OUT x BLOCK_IN values of dw, of TAPS taps, over one part of the rows."""
    SAME: tl.constexpr = R * S * STRIDE_H * STRIDE_W == 1 and PADDING_H + PADDING_W == 0  # a row of y is one of x
    FORMED: tl.constexpr = (norm is not None or BOX_H * BOX_W > 1) and x_norm is None  # else both are: products wait
    OF_IMAGES: tl.constexpr = BOX_H * BOX_W == 1
    STEP_H: tl.constexpr = STRIDE_H if OF_IMAGES else 1  # else the descriptor has the stride
    STEP_W: tl.constexpr = STRIDE_W if OF_IMAGES else 1
    TAPS_W: tl.constexpr = 1 if NARROW else S
    RUN: tl.constexpr = S if NARROW else 1  # the taps side by side that count as one
    channels = NARROW if NARROW else C
    # Which values of dw.
    SETS: tl.constexpr = R * TAPS_W // TAPS
    tiles = tl.cdiv(K, BLOCK_OUT) * SETS * tiles_of_run
    tile, part = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    k0 = tile // (SETS * tiles_of_run) * BLOCK_OUT
    k = k0 + tl.arange(0, BLOCK_OUT)
    known = k < K
    first_tap = tile // tiles_of_run % SETS * TAPS
    lowest = channels_of_groups(k0, BLOCK_OUT, K, RUN * channels, GROUP_OUT, GROUP_IN)[0]
    run = lowest + tile % tiles_of_run * BLOCK_IN + tl.arange(0, BLOCK_IN)
    channel = run < RUN * channels
    c = run
    if NARROW:
        c = run % NARROW

    # Products over this part's rows; dy and the activation are formed as g and x are loaded.
    results = ()
    for _ in tl.static_range(TAPS):
        results += (tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32),)  # type: ignore[assignment]
    start = part.to(tl.int64) * tiles_a_part
    if x_norm is None:  # an operand that is not formed in registers: said, or ptxas makes wgmma wait for each other
        tl.assume(tiles_a_part > 0)
    for step in range(tiles_a_part):
        of_rows, first = (start + step).to(tl.int32), (start + step) * BLOCK_ROWS
        g_tile, g_row = first * K, tl.arange(0, BLOCK_ROWS) * K
        if SAME:
            exists = tl.arange(0, BLOCK_ROWS) < rows - first
            x_tile, x_row = first * channels, tl.arange(0, BLOCK_ROWS) * channels
        else:
            image, n, i, j, exists = locate(of_rows, rows, OH, OW, BLOCK_ROWS, BOX_H, BOX_W)
            top_h, left_w = i * STRIDE_H - PADDING_H, j * STRIDE_W - PADDING_W
            x_tile, x_row = image * H * W * channels, ((n * H + top_h) * W + left_w) * channels
            if BOX_W:
                g_tile, g_row = image * OH * OW * K, ((n * OH + i) * OW + j) * K
        box, top, left = corner(of_rows, OH, OW, BLOCK_ROWS, BOX_H, BOX_W)
        at = g_tile + (g_row[:, None] + k[None, :])
        inside = exists[:, None] & known[None, :]
        dy = load(g, g_tiles, at, inside, box, top, left, k0, OF_IMAGES)
        if norm is not None:
            value = load(y, y_tiles, at, inside, box, top, left, k0, OF_IMAGES) if y is not None else None
            dy = through_batch_norm(dy, value, norm, factors, inside, k, known, K).to(g.dtype.element_ty)
        before, results = results, ()
        for t in tl.static_range(TAPS):
            r, s = (first_tap + t) // TAPS_W, (first_tap + t) % TAPS_W
            pixel = exists[:, None]
            at = x_tile + (x_row[:, None] + run[None, :])
            if not SAME:
                h, w = top_h + r, left_w + s
                at += (r * W + s) * channels
                pixel &= ((h >= 0) & (h < H))[:, None]
                if NARROW:
                    s_of_run = w[:, None] + (run // NARROW)[None, :]
                    pixel &= (s_of_run >= 0) & (s_of_run < W)
                else:
                    pixel &= ((w >= 0) & (w < W))[:, None]
            inside = pixel & channel[None, :]
            c0 = tile % tiles_of_run * BLOCK_IN
            h_tap, w_tap = top * STEP_H + r - PADDING_H, left * STEP_W + s - PADDING_W
            a = load(x, x_tiles, at, inside, box, h_tap, w_tap, c0, OF_IMAGES)
            if x_norm is not None:
                value = tl.maximum(normalised(a, x_norm, c, channel, C), 0.0, propagate_nan=tl.PropagateNan.ALL)
                a = keep(value.to(x.dtype.element_ty), pixel)
            results += (multiply_add(tl.trans(dy), a, before[t], FORMED),)  # type: ignore[assignment]

    # Store.
    of_group = GROUP_IN if GROUP_IN else RUN * channels
    row = k * (R * TAPS_W * of_group) + first_tap * of_group
    inside = known[:, None] & channel[None, :]
    if GROUP_IN:
        row -= k // GROUP_OUT * GROUP_IN
        inside &= (k // GROUP_OUT)[:, None] == (run // GROUP_IN)[None, :]
    at = part.to(tl.int64) * (K * R * TAPS_W * of_group) + (row[:, None] + run[None, :])
    for t in tl.static_range(TAPS):
        tl.store(dw + at + t * of_group, results[t].to(dw.dtype.element_ty), mask=inside)


MOST_VALUES = 3 * 128 * 64  # of a tile with several taps: 96 registers a thread, of 8 warps
PARTIAL = 640  # rows whose products take as long as the result of a part does, written and read in fp32


@cache
def computed(shape: ConvShape, fusion: str, element_size: int, gpu: int) -> Configuration:
    """Returns tiles of 128 x 128, 32 rows at a time, or smaller as the weight is, 64. One fits an SM, or two of 64.

    Runs of taps, and groups, take registers for their addresses: 32 rows, too. From Hopper on a product has at least 64
    rows, which are dw's channels out. The taps of a row, or the runs of all rows, are one tile if they fit registers.
    What TMA brings from memory as it is multiplied leaves registers and memory for two programs of 64 rows, or for
    several taps of 32. Of 64 channels, columns of 8 pixels are 1.4 times as fast as images (H200).
    """
    most = 128 if shape.groups == 1 else 64
    block_out, block_in = tile_of(shape.k, most), tile_of(shape.run, most)
    if gpu >= 9 and element_size == 2:
        block_out = max(block_out, 64)
    taps = shape.r if shape.narrow else shape.s
    fits = gpu >= 9 and block_out * min(block_in, 64) * taps <= MOST_VALUES  # before, ptxas spills
    if taps > 1 and fits and element_size == 2 and shape.groups == 1:
        block_in = min(block_in, 64)
    else:
        taps = 1
    by_images = images_by_tma(shape, element_size, gpu)
    stored = fusion == "alone" and (by_images or by_tma(shape, element_size, gpu))
    few = block_out <= 64 or block_out * block_in <= 128 * 64 // taps
    rows = 64 if stored or (few and not shape.narrow and shape.groups == 1) else 32
    programs = SMS if block_out > 64 and not stored else 2 * SMS
    warps, stages = 8, 3
    if stored and taps > 1:
        rows, warps, stages = (32, 4, 4) if block_out > 64 else (64, 4, 3)
    elif shape.narrow and fusion == "alone" and gpu == 9 and element_size == 2:
        rows, warps, stages, programs = 64, 4, 6, SMS
    config = {
        "BLOCK_ROWS": rows,
        "BLOCK_OUT": block_out,
        "BLOCK_IN": block_in,
        "TAPS": taps,
        "PARTS": parts_of(tiles_of(shape, block_out, block_in, taps)[1], cdiv(shape.rows, rows), rows, programs),
        "TMA": int(stored),
        "num_warps": warps,
        "num_stages": stages,
    }
    if stored:
        column = block_out == 64 and shape.stride == (1, 1) and shape.oh % 8 == 0
        return config | ({"BOX_H": 8 if column else 1, "BOX_W": 1} if by_images else {})
    config |= {"maxnreg": 255} if gpu >= 10 else {}  # unasked, ptxas may stop at 64 or 128 and spill a few bytes
    return config | box_sizes(shape, rows, shape.oh, shape.ow)


def parts_of(tiles: int, of_rows: int, rows: int, programs: int) -> int:
    """Returns into how many parts to share out `of_rows` tiles of `rows` rows, so that the last turn is nearly full.

    The programs take turns, `programs` at a time, each as long as a part and, if there are several, as its result.
    """

    def time(parts: int) -> float:
        result = PARTIAL / rows if parts > 1 else 0
        return cdiv(tiles * parts, programs) * (cdiv(of_rows, parts) + result)

    most = min(of_rows, max(1, 4 * programs // tiles))
    return min(range(1, most + 1), key=time)


def tiles_of(shape: ConvShape, block_out: int, block_in: int, taps: int) -> tuple[int, int]:
    """Returns the tiles of a tap's run, and those of the weight, each of so many taps."""
    run = shape.run if shape.groups == 1 else most_channels_of_groups(shape, block_out)
    sets = (shape.r if shape.narrow else shape.r * shape.s) // taps
    return cdiv(run, block_in), cdiv(shape.k, block_out) * sets * cdiv(run, block_in)


def launch_sizes(shape: ConvShape, config: Configuration) -> tuple[int, int, int, int]:
    """Returns tiles of a tap's run, tiles, parts of the rows, tiles of rows a part."""
    of_rows = tiles_of_rows(shape.n, shape.oh, shape.ow, config)
    tiles_a_part = cdiv(of_rows, min(config["PARTS"], of_rows))
    of_weight = tiles_of(shape, config["BLOCK_OUT"], config["BLOCK_IN"], config["TAPS"])
    return *of_weight, cdiv(of_rows, tiles_a_part), tiles_a_part


@operator("convolution_weight_gradient", mutates_args=("out",))
def convolution_weight_gradient(
    g: Tensor,
    x: Tensor,
    out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int = 1,
    y: Tensor | None = None,
    norm: Tensor | None = None,
    factors: Tensor | None = None,
    x_norm: Tensor | None = None,
) -> None:
    """Stores dw in `out`.

    g: (N, K, OH, OW), fp16, bf16 or fp32, channels-last. x: (N, C, H, W), like g. out: (K, C / groups, R, S), of g's
    dtype or fp32, channels-last. stride, padding: of H and W. y, norm, factors: dy of g, as in
    `convolution_data_gradient`. x_norm: (5, C), fp32, where x is raw: relu of its normalised value was convolved.
    Raises ValueError for other layouts, shapes, dtypes or devices.
    """
    op = "convolution_weight_gradient"
    check_images(op, "g", g)
    check_weight(op, "out", out, tuple({g.dtype: 0, torch.float32: 0}), g.device)
    if x.dtype != g.dtype or x.device != g.device:
        raise ValueError(f"{op}: x must be {g.dtype}, on {g.device}; got {x.dtype}, on {x.device}")
    shape = conv_shape(op, check_images(op, "x", x), out, stride, padding, groups)
    if g.shape != shape.output:
        raise ValueError(f"{op}: of that x and out, g must be {shape.output}, got {tuple(g.shape)}")
    check_like(op, g, y=y)
    rows = {"norm": (norm, (5, shape.k)), "factors": (factors, (2, shape.k)), "x_norm": (x_norm, (5, shape.c))}
    check_tensors(op, g.device, single_or_double(g), **rows)
    check_together(op, y=y, factors=factors)
    if factors is not None and norm is None:
        raise ValueError(f"{op}: factors need norm")
    if not runs_triton(g.device):
        return reference(g, x, out, stride, padding, groups, y, norm, factors, x_norm)
    config = configured_for(op, g, shape, fusion_of(norm=norm, y=y, x_norm=x_norm), computed)
    config = {"TAPS": 1, **config}
    if (shape.r if shape.narrow else shape.r * shape.s) % config["TAPS"]:
        raise ValueError(f"{op}: TAPS divides the taps, or the runs of them; got {dict(config)} for {shape.key}")
    tiles_of_run, tiles, parts, tiles_a_part = launch_sizes(shape, config)
    matrices = {
        "g": (g, "BLOCK_ROWS", "BLOCK_OUT"),
        "y": (y, "BLOCK_ROWS", "BLOCK_OUT"),
        "x": (x, "BLOCK_ROWS", "BLOCK_IN"),
    }
    options = launch_options(op, shape, config, **matrices)
    del options["PARTS"]
    partial = out
    if parts > 1:
        partial = torch.empty((parts, out.numel()), dtype=torch.float32, device=g.device)
    launch(
        kernel,
        (tiles * parts,),
        *(g, x, y, norm, factors, x_norm, partial, shape.rows, tiles_a_part, tiles_of_run),
        *(shape.c, shape.h, shape.w, shape.k, shape.oh, shape.ow),
        **shape.constants,
        NARROW=shape.narrow,
        **options,
    )
    if parts > 1:
        store_sum(partial, out)
    return None
