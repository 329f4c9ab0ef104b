"""y[n, c, i, j] = max of x[n, c] over a window, and dx = the dy of every window in which that value is the maximum.

A NaN is larger than all else. Among equal values the window's first is the maximum, among several NaN its last: both as
torch.nn.functional.max_pool2d has it on a CPU, https://pytorch.org/docs/stable/generated/torch.nn.MaxPool2d.html .

With BatchNorm's `norm`, what is pooled is relu((x - mean) scale + shift), formed as the raw x is loaded and rounded to
its dtype, so that y and the places are those of the tensor that `batch_norm` would have stored. Backward then masks dx
as it stores it, and takes the sums that `norm_gradient` needs: of g, which is what it stores, and of g (x - mean).

Bytes: forward reads x, writes y and, where a gradient will be asked for, 1 byte a value of y: the maximum's position in
its window. Backward reads dy and that byte, with norm x as well, writes dx; it gathers, and the windows over a pixel
overlap in cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import (
    check_images,
    check_like,
    check_tensors,
    check_together,
    empty_images,
    pitch_of,
    single_or_double,
)
from kernels.configurations import Configuration, cdiv, configuration, dtype_name, next_power_of_2
from kernels.implementation import runs_triton
from kernels.launch import launch
from kernels.norm_rows import MEAN, SCALE, SHIFT, load_row, normalise, sums_reference
from kernels.operators import named, operator
from kernels.partial_sums import empty_sums

LARGEST = 15  # kernel size: 15 x 15 positions fit into the byte


def output_size(extent: int, kernel_size: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """Returns the number of windows along `extent` pixels. With ceil_mode the last may stick out, but begins inside."""
    left = extent + 2 * padding - kernel_size
    if not ceil_mode:
        return left // stride + 1
    return min(cdiv(left, stride), (extent + padding - 1) // stride) + 1


def reference(x, kernel_size, stride, padding, norm, ceil_mode):
    """Returns PyTorch's y and the int64 indices into H x W that its backward takes, both (N, C, OH, OW)."""
    if norm is not None:
        x = normalise(x, norm, None, True)
    return torch.ops.aten.max_pool2d_with_indices(x, [kernel_size] * 2, [stride] * 2, [padding] * 2, [1, 1], ceil_mode)


def backward_reference(dy, argmax, dx, kernel_size, stride, padding, x, norm):
    """Returns dx and the sums; the dx argument is used only for its shape."""
    window = [kernel_size] * 2, [stride] * 2, [padding] * 2
    floors = [output_size(extent, kernel_size, stride, padding, False) for extent in dx.shape[2:]]
    ceil_mode = list(dy.shape[2:]) != floors  # where both modes have the same windows, either will do
    dx = torch.ops.aten.max_pool2d_with_indices_backward(dy, dx, *window, [1, 1], ceil_mode, argmax)
    if x is None or norm is None:
        return dx, empty_sums(dx, None, 0, 0)
    g = torch.ops.aten.threshold_backward(dx, normalise(x, norm, None, False), 0)
    return g, sums_reference(g, x, norm)


@triton.jit(repr=named("max_pool", "norm"))
def kernel(
    x, norm, y, argmax, PIXELS, H, W, OH, OW,
    C: tl.constexpr, PITCH: tl.constexpr, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_C channels of BLOCK_PIXELS of the PIXELS = N x OH x OW pixels.

    norm and argmax may be None. PITCH: from a pixel of y to the next; C, unless y is a slice of channels.
    """
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (pixel < PIXELS)[:, None] & (c < C)
    first_h = pixel // OW % OH * STRIDE - PADDING
    first_w = pixel % OW * STRIDE - PADDING
    first = (pixel // (OH * OW)).to(tl.int64) * (H * W) + first_h * W + first_w
    if norm is not None:
        mean = load_row(norm, MEAN, c, c < C, C)
        scale = load_row(norm, SCALE, c, c < C, C)
        shift = load_row(norm, SHIFT, c, c < C, C)
    LEAST: tl.constexpr = float("-inf") if norm is None else 0.0  # a maximum that begins at 0 is relu's
    largest = tl.full((BLOCK_PIXELS, BLOCK_C), LEAST, tl.float32)
    # The first position that is not padding: that of the maximum if all values are the least.
    position = tl.maximum(-first_h, 0) * KERNEL_SIZE + tl.maximum(-first_w, 0)
    position = tl.broadcast_to(position[:, None], (BLOCK_PIXELS, BLOCK_C))
    for r in tl.static_range(KERNEL_SIZE):
        for s in tl.static_range(KERNEL_SIZE):
            h, w = first_h + r, first_w + s
            valid = inside & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
            value = tl.load(x + (first + (r * W + s))[:, None] * C + c, mask=valid, other=LEAST).to(tl.float32)
            if norm is not None:
                value = ((value - mean) * scale + shift).to(x.dtype.element_ty).to(tl.float32)
                value = tl.where(valid, value, LEAST)
            larger = (value > largest) ^ (value != value)  # never both
            largest = tl.maximum(largest, value, propagate_nan=tl.PropagateNan.ALL)
            position = tl.where(larger, r * KERNEL_SIZE + s, position)
    place = pixel.to(tl.int64)[:, None]
    tl.store(y + (place * PITCH + c), largest.to(y.dtype.element_ty), mask=inside)
    if argmax is not None:
        tl.store(argmax + (place * C + c), position.to(tl.uint8), mask=inside)


@triton.jit(repr=named("max_pool_backward", "norm"))
def backward_kernel(
    # inputs
    dy, argmax, x, norm,
    # outputs
    dx, sums,
    # sizes, and what is compiled in
    CELLS, ROWS, COLUMNS, H, W, OH, OW,
    C: tl.constexpr, PITCH: tl.constexpr, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_C channels of BLOCK_PIXELS of the N x ROWS x COLUMNS = CELLS cells of dx.

    A cell is STRIDE x STRIDE pixels: the windows over it are read once, and where in them its pixels are is constant.
    PITCH: from a pixel of dy to the next; C, unless dy is a slice of channels.
    With norm a program goes on to other cells, and adds up what it stores: one part of the sums.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    if norm is not None:
        mean = load_row(norm, MEAN, c, c < C, C)
        scale = load_row(norm, SCALE, c, c < C, C)
        shift = load_row(norm, SHIFT, c, c < C, C)
        sum_of_g = tl.zeros((BLOCK_PIXELS, BLOCK_C), tl.float32)
        products = tl.zeros((BLOCK_PIXELS, BLOCK_C), tl.float32)
    for turn in range(1 if norm is None else tl.cdiv(tl.cdiv(CELLS, BLOCK_PIXELS) - part, parts)):
        cell = (part + turn * parts) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        inside = (cell < CELLS)[:, None] & (c < C)
        n = (cell // (ROWS * COLUMNS)).to(tl.int64)
        row = cell // COLUMNS % ROWS + PADDING // STRIDE
        column = cell % COLUMNS + PADDING // STRIDE
        WINDOWS: tl.constexpr = (KERNEL_SIZE + STRIDE - 1) // STRIDE  # over a cell, each way; the last is its own
        gradients, positions, values = (), (), ()
        for i in tl.static_range(1 - WINDOWS, 1):
            for j in tl.static_range(1 - WINDOWS, 1):
                oh, ow = row + i, column + j
                valid = inside & ((oh >= 0) & (oh < OH) & (ow >= 0) & (ow < OW))[:, None]
                place = ((n * OH + oh) * OW + ow)[:, None]
                at = place * C + c
                of_dy = at if PITCH == C else place * PITCH + c
                gradients += (tl.load(dy + of_dy, mask=valid).to(tl.float32),)  # type: ignore[assignment]
                positions += (tl.load(argmax + at, mask=valid, other=255),)  # type: ignore[assignment]
        if norm is not None:  # all loads come before the stores, which they could not pass
            for pixel in tl.static_range(STRIDE * STRIDE):
                h, w = row * STRIDE + pixel // STRIDE - PADDING, column * STRIDE + pixel % STRIDE - PADDING
                valid = inside & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
                at = ((n * H + h) * W + w)[:, None] * C + c
                values += (tl.load(x + at, mask=valid, other=0.0),)  # type: ignore[assignment]
        for a in tl.static_range(STRIDE):
            for b in tl.static_range(STRIDE):
                total = tl.zeros((BLOCK_PIXELS, BLOCK_C), tl.float32)
                for window in tl.static_range(WINDOWS * WINDOWS):
                    r = a + (WINDOWS - 1 - window // WINDOWS) * STRIDE
                    s = b + (WINDOWS - 1 - window % WINDOWS) * STRIDE
                    if r < KERNEL_SIZE and s < KERNEL_SIZE:
                        total += tl.where(positions[window] == r * KERNEL_SIZE + s, gradients[window], 0.0)
                h, w = row * STRIDE + a - PADDING, column * STRIDE + b - PADDING
                valid = inside & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
                at = ((n * H + h) * W + w)[:, None] * C + c
                stored = total.to(dx.dtype.element_ty)
                if norm is not None:
                    d = values[a * STRIDE + b].to(tl.float32) - mean
                    # A NaN lets the gradient pass, as in PyTorch.
                    stored = tl.where(valid & ~(d * scale + shift <= 0), stored, 0.0)
                    sum_of_g += stored.to(tl.float32)
                    products += stored.to(tl.float32) * d
                tl.store(dx + at, stored, mask=valid)
    if norm is not None:
        at = part.to(tl.int64) * C + c
        tl.store(sums + at, tl.sum(sum_of_g, 0)[None, :], mask=c < C)
        tl.store(sums + parts * C + at, tl.sum(products, 0)[None, :], mask=c < C)


def configured(op: str, images: Tensor, kernel_size: int, stride: int, norm: Tensor | None) -> Configuration:
    """Returns 8 values of the images that are written, 16 bytes of fp16, a thread, with few channels idle.

    PROGRAMS are those of a backward with sums, which fill a GPU several times.
    """
    c = images.shape[1]
    block_c = min(next_power_of_2(c), min((128, 64, 32), key=lambda block: cdiv(c, block) * block))
    computed = {"BLOCK_C": block_c, "BLOCK_PIXELS": 1024 // block_c, "num_warps": 4}
    key = f"{dtype_name(images.dtype)} C={c} kernel={kernel_size} stride={stride}"
    if norm is not None:
        key += " norm"
        computed |= {"PROGRAMS": 1024} if op == "max_pool_backward" else {}
    return configuration(op, key, images.device, computed)


def grid(pixels: int, c: int, config: Configuration) -> tuple[int, int]:
    return cdiv(pixels, config["BLOCK_PIXELS"]), cdiv(c, config["BLOCK_C"])


def max_pool(x: Tensor, kernel_size: int, stride: int, padding: int = 0, ceil_mode: bool = False) -> Tensor:
    """Returns the maximum of each window, kernel_size x kernel_size every stride pixels, differentiable.

    x: (N, C, H, W), fp16, bf16 or fp32, channels-last, surrounded by `padding` of -inf. Returns (N, C, OH, OW) in x's
    dtype, channels-last, OH = floor((H + 2 padding - kernel_size) / stride) + 1. `ceil_mode` rounds that up, and the
    last window may stick out; it begins inside of x or of the padding before it. Raises ValueError for another layout,
    shape or dtype, a kernel size or stride above 15, padding above half the kernel, and a window that does not fit.
    """
    with_argmax = torch.is_grad_enabled() and x.requires_grad
    return max_pool_with_argmax(x, kernel_size, stride, padding, with_argmax, None, ceil_mode)[0]


@operator("max_pool")
def max_pool_with_argmax(
    x: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    with_argmax: bool,
    norm: Tensor | None = None,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns y and, with `with_argmax`, the places of its maxima, for the backward alone; else an empty tensor.

    A place is a uint8 in the window, or of the reference an int64 in H x W.
    norm: (5, C), fp32, of `batch_norm_statistics` or `norm_of`: relu of the normalised x is pooled. Autograd does not
    go through it: whoever has the rest of BatchNorm's backward calls `max_pool_backward`.
    """
    shape = checked(x, kernel_size, stride, padding, norm, ceil_mode)
    if runs_triton(x.device):
        y = empty_images(x, shape)
        return y, write(x, kernel_size, stride, padding, with_argmax, norm, y)
    y, argmax = reference(x, kernel_size, stride, padding, norm, ceil_mode)
    return y, argmax if with_argmax else argmax.new_empty(0)


@operator("max_pool_into", mutates_args=("y",))
def max_pool_into(
    x: Tensor,
    kernel_size: int,
    stride: int,
    padding: int,
    with_argmax: bool,
    norm: Tensor | None,
    ceil_mode: bool,
    y: Tensor,
) -> Tensor:
    """Writes y of `max_pool_with_argmax` to y, like that, or a slice of the channels of such a tensor.

    Returns the places. Not differentiable: whoever concatenates has `max_pool_backward`.
    """
    op, shape = "max_pool_into", checked(x, kernel_size, stride, padding, norm, ceil_mode)
    check_images(op, "y", y, slices=True)
    if (y.shape, y.dtype, y.device) != (shape, x.dtype, x.device):
        raise ValueError(
            f"{op}: y must be {shape}, {x.dtype}, on {x.device}; got {tuple(y.shape)}, {y.dtype}, on {y.device}"
        )
    if runs_triton(x.device):
        return write(x, kernel_size, stride, padding, with_argmax, norm, y)
    maxima, argmax = reference(x, kernel_size, stride, padding, norm, ceil_mode)
    y.copy_(maxima)
    return argmax if with_argmax else argmax.new_empty(0)


def checked(
    x: Tensor, kernel_size: int, stride: int, padding: int, norm: Tensor | None, ceil_mode: bool
) -> tuple[int, ...]:
    """Returns the shape of y. Raises ValueError for what `max_pool` refuses."""
    n, c, h, w = check_images("max_pool", "x", x)
    check_tensors("max_pool", x.device, single_or_double(x), norm=(norm, (5, c)))
    if not (1 <= kernel_size <= LARGEST and 1 <= stride <= LARGEST and 0 <= padding <= kernel_size // 2):
        raise ValueError(
            f"max_pool: kernel_size and stride must be 1 .. {LARGEST}, padding 0 .. kernel_size // 2; "
            f"got {kernel_size}, {stride}, {padding}"
        )
    size = tuple(output_size(extent, kernel_size, stride, padding, ceil_mode) for extent in (h, w))
    if min(size) < 1:
        raise ValueError(
            f"max_pool: a window of {kernel_size} does not fit into {h} x {w} pixels with padding {padding}"
        )
    if runs_triton(x.device) and n * h * w >= 2**31:
        raise ValueError(f"max_pool: x must have less than 2**31 pixels, got {tuple(x.shape)}")
    return n, c, *size


def write(
    x: Tensor, kernel_size: int, stride: int, padding: int, with_argmax: bool, norm: Tensor | None, y: Tensor
) -> Tensor:
    """Writes the maxima to y, and returns their places, or an empty tensor."""
    n, c, *size = y.shape
    argmax = empty_images(x, y.shape, torch.uint8) if with_argmax else x.new_empty(0, dtype=torch.uint8)
    config, pixels = configured("max_pool", y, kernel_size, stride, norm), n * size[0] * size[1]
    launch(
        kernel,
        grid(pixels, c, config),
        *(x, norm, y, argmax if with_argmax else None),
        *(pixels, *x.shape[2:], *size, c, pitch_of(y), kernel_size, stride, padding),
        **config,
    )
    return argmax


@operator("max_pool_backward")
def max_pool_backward(
    dy: Tensor,
    argmax: Tensor,
    height: int,
    width: int,
    kernel_size: int,
    stride: int,
    padding: int,
    x: Tensor | None = None,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns dx, (N, C, height, width), channels-last, for dy and argmax, (N, C, OH, OW); and an empty tensor.

    dy may be a slice of channels.
    With x, like dx, and norm, as the forward had them, dx is g, the gradient behind relu's mask, and the second result
    the sums for `norm_gradient`.
    """
    op = "max_pool_backward"
    if argmax.shape != dy.shape:
        raise ValueError(f"max_pool: the backward needs argmax, {tuple(dy.shape)}, got {tuple(argmax.shape)}")
    check_together(op, x=x, norm=norm)
    if pitch_of(dy) is None:
        dy = dy.contiguous(memory_format=torch.channels_last)  # what was flattened for a linear layer is not
    n, c, *size = dy.shape
    dx = empty_images(dy, (n, c, height, width))
    check_like(op, dx, x=x)
    check_tensors(op, dy.device, single_or_double(dy), norm=(norm, (5, c)))
    if not runs_triton(dy.device):
        return backward_reference(dy, argmax, dx, kernel_size, stride, padding, x, norm)
    rows, columns = ((extent - 1 + padding) // stride - padding // stride + 1 for extent in (height, width))
    config, cells = configured(op, dx, kernel_size, stride, norm), n * rows * columns
    programs, across = grid(cells, c, config)
    if norm is not None:
        programs = min(programs, cdiv(config["PROGRAMS"], across))
    sums = empty_sums(dx, norm, programs, c)
    launch(
        backward_kernel,
        (programs, across),
        *(dy, argmax, x, norm, dx, None if norm is None else sums),
        *(cells, rows, columns, height, width, *size, c, pitch_of(dy), kernel_size, stride, padding),
        **{name: value for name, value in config.items() if name != "PROGRAMS"},
    )
    return dx, sums


def setup_context(ctx, inputs, output):
    x, *ctx.window, _, norm = (*inputs, None)[:6]  # backward sees ceil_mode in dy's size
    if norm is not None:
        raise ValueError("max_pool: with norm there is no autograd; max_pool_backward takes x and norm")
    ctx.size = x.shape[2:]
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)  # else zeros for the gradient of argmax


def backward(ctx, dy, _):
    dx = None if dy is None else max_pool_backward(dy, *ctx.saved_tensors, *ctx.size, *ctx.window)[0]
    return dx, *[None] * (len(ctx.needs_input_grad) - 1)


max_pool_with_argmax.register_autograd(backward, setup_context=setup_context)
