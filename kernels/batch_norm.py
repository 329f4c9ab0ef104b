"""y = relu((x - mean) scale + shift + residual), per channel, with or without the last two; and its gradients.

`norm` comes from `batch_norm_statistics`. With g = dy where the argument of relu is not below 0 or 0, else 0, and
n = N H W (Ioffe and Szegedy 2015, arXiv:1502.03167, section 3):
    d_residual = g,   d_beta = sum(g),   d_gamma = rstd sum(g (x - mean))
    dx = scale (g - d_beta / n) - (x - mean) scale rstd d_gamma / n
Sums are centred, because sum(g x) cancels where the mean is large. With the running statistics' norm (evaluation)
dx = scale g alone. The mask is never stored: it is taken again from x, or, with a residual, from y, which the next
convolution keeps anyway.

What is concatenated is written by `batch_norm_into`, into its slice of the channels, and the slice of the gradient is
read where it lies: pixels are then a `pitch` of values apart, which is more than C.

Bytes per fp16 value, forward: 4, reads x, writes y; and 2 for a residual. Backward: 10, reads dy and x twice, writes
dx; 14 with residual and relu, where the first pass also reads y and writes g, which the second reads for dy. What the
first pass takes along, a second gradient to add or a second raw tensor for sums, is 2 each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_images, check_like, check_tensors, check_together, single_or_double
from kernels.configurations import cdiv
from kernels.implementation import runs_triton
from kernels.launch import launch
from kernels.norm_rows import (
    D_BETA,
    D_GAMMA,
    MEAN,
    MEAN_LOW,
    RSTD,
    SCALE,
    SHIFT,
    data_gradient_reference,
    load_row,
    normalise,
    sums_reference,
)
from kernels.operators import named, operator
from kernels.partial_sums import NORM_CONFIG, few_parts, parts_of_rows, sum_parts
from kernels.tiles import configured_for_rows, load_sparse, pitch_in_units


def reference(x, norm, residual, relu):
    """Returns y in plain PyTorch. Arguments as in `batch_norm`."""
    return normalise(x, norm, residual, relu)


def backward_reference(dy, x, y, norm, relu, batch):
    """Returns dx, d_gamma, d_beta, g in plain PyTorch. Arguments as in `batch_norm_backward`."""
    mean, scale, _, rstd, _ = norm
    g = dy
    if relu:
        g = torch.ops.aten.threshold_backward(dy, normalise(x, norm, None, False) if y is None else y, 0)
    gamma, var = scale / rstd, rstd.square().reciprocal()
    wide = (g, x)
    if x.is_contiguous():  # one channel, or one pixel: PyTorch takes the path of NCHW, which rounds sums to x's dtype
        wide = (g.to(mean.dtype), x.to(mean.dtype))
    dx, d_gamma, d_beta = torch.ops.aten.native_batch_norm_backward(
        *wide, gamma, mean, var, mean, rstd, batch, 0.0, [True, True, True]
    )
    return dx.to(x.dtype), d_gamma, d_beta, g


def norm_gradient_reference(sums, norm, count):
    """Returns the rows in plain PyTorch. Arguments as in `norm_gradient`."""
    d_beta, products = sums.sum(1)
    _, scale, _, rstd, mean_low = norm
    d_gamma = rstd * (products - mean_low * d_beta)
    slope = -scale * rstd * d_gamma / count
    offset = -scale * d_beta / count - slope * mean_low
    return torch.stack((slope, offset, d_gamma, d_beta, torch.zeros_like(slope)))


@triton.jit
def masked(dy, x, y, at, inside, mean, scale, shift):
    """Returns dy where relu's argument was above 0, by the sign of x's normalised value, or of y where it is given."""
    if y is None:
        v = (x - mean) * scale + shift
    else:
        v = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(v <= 0, 0.0, dy)  # a NaN lets the gradient pass, as in PyTorch


@triton.jit(repr=named("batch_norm"))
def kernel(
    x, norm, residual, y, rows, C, pitch,
    UNIT: tl.constexpr, RELU: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_ROWS pixels x BLOCK_C channels of (N H W, C).

    pitch: of y, in UNITs; None where it is C.
    """
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at = row[:, None] * C + c[None, :]
    channel = c < C
    inside = (row < rows)[:, None] & channel[None, :]
    value = tl.load(x + at, mask=inside).to(tl.float32)
    if residual is not None:
        skip = tl.load(residual + at, mask=inside).to(tl.float32)
    mean = load_row(norm, MEAN, c, channel, C)[None, :]
    scale = load_row(norm, SCALE, c, channel, C)[None, :]
    shift = load_row(norm, SHIFT, c, channel, C)[None, :]
    value = (value - mean) * scale + shift
    if residual is not None:
        value += skip
    if RELU:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if pitch is not None:
        at = row[:, None] * (pitch * UNIT) + c[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(repr=named("batch_norm_sums"))
def sums_kernel(
    # inputs
    dy, skip, x, y, norm, branch, branch_norm,
    # outputs
    g, sums, branch_sums,
    # sizes, and what is compiled in
    rows, C, rows_a_part, pitch, H, W,
    UNIT: tl.constexpr, SKIP_STRIDE: tl.constexpr, RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program sums g and g (x - mean) over one part of the rows, and stores g where it is asked for.

    Where there is a branch, it sums g and g (branch - mean) as well. pitch: of dy, in UNITs; None where it is C.
    """
    part, parts = tl.program_id(0), tl.num_programs(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel = c < C
    mean = load_row(norm, MEAN, c, channel, C)[None, :]
    scale = load_row(norm, SCALE, c, channel, C)[None, :]
    shift = load_row(norm, SHIFT, c, channel, C)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    if branch is not None:
        branch_mean = load_row(branch_norm, MEAN, c, channel, C)[None, :]
        branch_products = tl.zeros((BLOCK_ROWS, BLOCK_C), tl.float32)
    first = part.to(tl.int64) * rows_a_part
    for offset in range(0, rows_a_part, BLOCK_ROWS):
        row = (first + offset + tl.arange(0, BLOCK_ROWS))[:, None]
        at = row * C + c[None, :]
        inside = (row < rows) & channel[None, :]
        of_dy = at if pitch is None else row * (pitch * UNIT) + c[None, :]
        gradient = tl.load(dy + of_dy, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        if skip is not None:
            if SKIP_STRIDE == 1:
                gradient += tl.load(skip + at, mask=inside, other=0.0).to(tl.float32)
            else:
                image = first // (H * W)
                pixel = (first - image * (H * W)).to(tl.int32) + offset + tl.arange(0, BLOCK_ROWS)
                n, pixel = pixel // (H * W), pixel % (H * W)
                gradient += load_sparse(skip, SKIP_STRIDE, image, n, pixel // W, pixel % W, c, inside, H, W, C)
            gradient = gradient.to(dy.dtype.element_ty).to(tl.float32)  # the sums are of what is stored, here as well
        if RELU:
            gradient = masked(gradient, value, y, at, inside, mean, scale, shift)
        if g is not None:
            tl.store(g + at, gradient.to(g.dtype.element_ty), mask=inside)
        total += gradient
        products += tl.where(inside, gradient * (value - mean), 0.0)
        if branch is not None:
            other = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
            branch_products += tl.where(inside, gradient * (other - branch_mean), 0.0)
    at = part.to(tl.int64) * C + c
    sum_of_g = tl.sum(total, 0)
    tl.store(sums + at, sum_of_g, mask=channel)
    tl.store(sums + parts * C + at, tl.sum(products, 0), mask=channel)
    if branch is not None:
        tl.store(branch_sums + at, sum_of_g, mask=channel)
        tl.store(branch_sums + parts * C + at, tl.sum(branch_products, 0), mask=channel)


@triton.jit(repr=named("batch_norm_gradient_norm"))
def norm_kernel(
    # inputs
    sums, norm,
    # outputs
    d_gamma, d_beta, rows,
    # sizes, and what is compiled in
    parts, C, count, BLOCK_PARTS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_C channels. `rows` gets FACTORS and the last row, which is 0; None in evaluation."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    total = sum_parts(sums, parts, c, C, BLOCK_PARTS, BLOCK_C)
    products = sum_parts(sums + parts * C, parts, c, C, BLOCK_PARTS, BLOCK_C)
    scale = load_row(norm, SCALE, c, inside, C)
    rstd = load_row(norm, RSTD, c, inside, C)
    mean_low = load_row(norm, MEAN_LOW, c, inside, C)
    gamma_gradient = rstd * (products - mean_low * total)
    tl.store(d_gamma + c, gamma_gradient, mask=inside)
    tl.store(d_beta + c, total, mask=inside)
    if rows is not None:
        slope = -scale * rstd * gamma_gradient / count
        tl.store(rows + c, slope, mask=inside)
        tl.store(rows + C + c, -scale * total / count - slope * mean_low, mask=inside)
        tl.store(rows + 4 * C + c, tl.zeros((BLOCK_C,), tl.float32), mask=inside)


@triton.jit(repr=named("batch_norm_gradient"))
def gradient_kernel(
    # inputs
    dy, x, y, norm, factors,
    # output
    dx,
    # sizes, and what is compiled in
    rows, C, pitch,
    UNIT: tl.constexpr, RELU: tl.constexpr, BATCH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program computes dx of BLOCK_ROWS pixels x BLOCK_C channels. pitch: as in `sums_kernel`."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at = row[:, None] * C + c[None, :]
    channel = c < C
    inside = (row < rows)[:, None] & channel[None, :]
    of_dy = at if pitch is None else row[:, None] * (pitch * UNIT) + c[None, :]
    gradient = tl.load(dy + of_dy, mask=inside, other=0.0).to(tl.float32)
    scale = load_row(norm, SCALE, c, channel, C)[None, :]
    if RELU or BATCH:
        mean = load_row(norm, MEAN, c, channel, C)[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        shift = load_row(norm, SHIFT, c, channel, C)[None, :]
        gradient = masked(gradient, value, y, at, inside, mean, scale, shift)
    result = scale * gradient
    if BATCH:
        slope = load_row(factors, 0, c, channel, C)[None, :]
        result += slope * (value - mean) + load_row(factors, 1, c, channel, C)[None, :]
    tl.store(dx + at, result.to(dx.dtype.element_ty), mask=inside)


@operator("batch_norm")
def batch_norm(
    x: Tensor, gamma: Tensor, beta: Tensor, norm: Tensor, residual: Tensor | None, relu: bool, batch: bool
) -> Tensor:
    """Normalises by `norm`, adds `residual` if there is one, and applies ReLU if `relu`. Differentiable.

    x: (N, C, H, W), fp16, bf16 or fp32, channels-last. norm: (5, C), fp32, of `batch_norm_statistics` with `batch`
    (the gradient of x then goes through the statistics), or else any others, as of `norm_of`. gamma, beta: (C,), fp32,
    those that norm was made with: they are here for their gradients. residual: like x.
    Returns a new tensor like x. Raises ValueError for other layouts, shapes, dtypes or devices.
    """
    op = "batch_norm"
    c = check_images(op, "x", x)[1]
    check_tensors(op, x.device, single_or_double(x), gamma=(gamma, (c,)), beta=(beta, (c,)), norm=(norm, (5, c)))
    if residual is not None:
        check_images(op, "residual", residual, like=x)
    if not runs_triton(x.device):
        return reference(x, norm, residual, relu)
    y = torch.empty_like(x)
    write(x, norm, residual, relu, y)
    return y


@operator("batch_norm_into", mutates_args=("y",))
def batch_norm_into(x: Tensor, norm: Tensor, relu: bool, y: Tensor) -> None:
    """Writes what `batch_norm` returns of x and norm to y, like x, or a slice of the channels of such a tensor.

    Not differentiable: whoever concatenates has `batch_norm_gradient_sums`.
    """
    op = "batch_norm_into"
    c = check_images(op, "x", x)[1]
    check_images(op, "y", y, like=x, slices=True)
    check_tensors(op, x.device, single_or_double(x), norm=(norm, (5, c)))
    if runs_triton(x.device):
        write(x, norm, None, relu, y)
    else:
        y.copy_(reference(x, norm, None, relu))


def write(x: Tensor, norm: Tensor, residual: Tensor | None, relu: bool, y: Tensor) -> None:
    n, c, h, w = x.shape
    tile = {name: value for name, value in configured_for_rows("batch_norm", x).items() if name != "PROGRAMS"}
    grid = (cdiv(n * h * w, tile["BLOCK_ROWS"]), cdiv(c, tile["BLOCK_C"]))
    pitch, unit = pitch_in_units(y)
    launch(kernel, grid, x, norm, residual, y, n * h * w, c, pitch, UNIT=unit, RELU=relu, **tile)


@operator("batch_norm_backward")
def batch_norm_backward(
    dy: Tensor, x: Tensor, y: Tensor | None, norm: Tensor, relu: bool, batch: bool, with_g: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, d_gamma, d_beta, and with `with_g` the gradient g behind the mask (else an empty tensor).

    dy: like x, or a slice of channels. y: what `batch_norm` returned; None where relu's mask shall be taken from x,
    without a residual only. The rest as in `batch_norm`.
    """
    op = "batch_norm_backward"
    n, _, h, w = check_images(op, "x", x)
    check_images(op, "dy", dy, like=x, slices=True)
    if not runs_triton(x.device):
        dx, d_gamma, d_beta, g = backward_reference(dy, x, y, norm, relu, batch)
        return dx, d_gamma, d_beta, g if with_g else x.new_empty(0)
    g = torch.empty_like(x) if with_g else x.new_empty(0)
    sums, _ = launch_sums(dy, None, x, y, norm, None, None, g if with_g else None, relu)
    d_gamma, d_beta = torch.empty_like(norm[0]), torch.empty_like(norm[0])
    rows = torch.empty_like(norm) if batch else None
    launch_norm(sums, norm, n * h * w, d_gamma, d_beta, rows)
    of_g = (g, x, None, norm) if with_g else (dy, x, y, norm)
    return launch_gradient(*of_g, rows, relu and not with_g), d_gamma, d_beta, g


def launch_sums(
    dy: Tensor,
    skip: Tensor | None,
    x: Tensor,
    y: Tensor | None,
    norm: Tensor,
    branch: Tensor | None,
    branch_norm: Tensor | None,
    g: Tensor | None,
    relu: bool,
    skip_stride: int = 1,
) -> tuple[Tensor, Tensor]:
    """Returns the sums, (2, P, C), of g and of g (x - mean), and those of the branch, which are empty without one.

    Stores g itself where there is room for it.
    """
    n, c, h, w = x.shape
    config = configured_for_rows("batch_norm_backward", x)
    tile = {name: value for name, value in config.items() if name != "PROGRAMS"}
    parts, rows_a_part = parts_of_rows(n * h * w, c, config)
    sums, branch_sums = (
        torch.empty((2, parts, c) if raw is not None else 0, dtype=torch.float32, device=x.device)
        for raw in (x, branch)
    )
    inputs, outputs = (dy, skip, x, y, norm, branch, branch_norm), (g, sums, branch_sums)
    grid, (pitch, unit) = (parts, cdiv(c, config["BLOCK_C"])), pitch_in_units(dy)
    sizes, options = (n * h * w, c, rows_a_part, pitch, h, w), {"UNIT": unit, "SKIP_STRIDE": skip_stride, "RELU": relu}
    launch(sums_kernel, grid, *inputs, *outputs, *sizes, **options, **tile)
    return sums, branch_sums


def launch_gradient(g: Tensor, x: Tensor, y: Tensor | None, norm: Tensor, factors: Tensor | None, relu: bool) -> Tensor:
    """Returns dx; without factors it is SCALE g."""
    n, c, h, w = x.shape
    dx = torch.empty_like(x)
    tile = {name: value for name, value in configured_for_rows("batch_norm_backward", x).items() if name != "PROGRAMS"}
    grid = (cdiv(n * h * w, tile["BLOCK_ROWS"]), cdiv(c, tile["BLOCK_C"]))
    pitch, unit = pitch_in_units(g)
    options = {"UNIT": unit, "RELU": relu, "BATCH": factors is not None}
    launch(gradient_kernel, grid, g, x, y, norm, factors, dx, n * h * w, c, pitch, **options, **tile)
    return dx


def launch_norm(sums: Tensor, norm: Tensor, count: int, d_gamma: Tensor, d_beta: Tensor, rows: Tensor | None) -> None:
    sums, c = few_parts(sums), norm.shape[1]
    grid = (cdiv(c, NORM_CONFIG["BLOCK_C"]),)
    launch(norm_kernel, grid, sums, norm, d_gamma, d_beta, rows, sums.shape[1], c, float(count), **NORM_CONFIG)


@operator("norm_gradient")
def norm_gradient(sums: Tensor, norm: Tensor, count: int) -> Tensor:
    """Returns FACTORS, D_GAMMA and D_BETA, (5, C), from the sums that the producer of g has taken: no pass over x.

    sums: (2, P, C), fp32: over P parts of the batch, sum(g) and sum(g (x - MEAN)), g being the gradient behind the
    mask. norm: (5, C), of `batch_norm_statistics`. count: values a channel, N H W.
    Whoever reads g and x has dx = SCALE g + FACTORS[0] (x - MEAN) + FACTORS[1]. The shape is that of norm, so that
    this may be their gradient in autograd; the last row is 0.
    """
    op, (_, parts, c) = "norm_gradient", sums.shape
    check_tensors(op, sums.device, sums.dtype, sums=(sums, (2, parts, c)), norm=(norm, (5, c)))
    if not runs_triton(sums.device):
        return norm_gradient_reference(sums, norm, count)
    rows = torch.empty_like(norm)
    launch_norm(sums, norm, count, rows[D_GAMMA], rows[D_BETA], rows)
    return rows


@operator("batch_norm_gradient_sums")
def batch_norm_gradient_sums(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    norm: Tensor,
    relu: bool,
    skip: Tensor | None = None,
    branch: Tensor | None = None,
    branch_norm: Tensor | None = None,
    skip_stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns g, the gradient behind relu's mask (empty without `relu`: it is dy), and the sums for `norm_gradient`.

    The last are the sums with branch, empty without one.
    dy: like x, or a slice of channels; the gradient of relu((x - mean) scale + shift + residual). y: that value, or
    None where the mask shall be taken from x, without a residual only. x, norm: as in `batch_norm`. skip: like x, or
    like every skip_stride-th of its pixels, added to those of dy; with relu only.
    branch, branch_norm: likewise x and norm of a residual that was normalised, too.
    """
    op = "batch_norm_gradient_sums"
    c = check_images(op, "x", x)[1]
    check_images(op, "dy", dy, like=x, slices=True)
    check_like(op, x, y=y, branch=branch)
    check_like(op, x[:, :, ::skip_stride, ::skip_stride], skip=skip)
    check_tensors(op, x.device, single_or_double(x), norm=(norm, (5, c)), branch_norm=(branch_norm, (5, c)))
    check_together(op, branch=branch, branch_norm=branch_norm)
    if skip is not None and not relu:
        raise ValueError(f"{op}: skip is added where g is stored, which is with relu only")
    g = torch.empty_like(x) if relu else x.new_empty(0)
    if runs_triton(x.device):
        return g, *launch_sums(dy, skip, x, y, norm, branch, branch_norm, g if relu else None, relu, skip_stride)
    if skip is not None:
        dy = dy.clone()
        dy[:, :, ::skip_stride, ::skip_stride] += skip
    if relu:
        g = torch.ops.aten.threshold_backward(dy, normalise(x, norm, None, False) if y is None else y, 0)
    masked_dy = g if relu else dy
    sums = sums_reference(masked_dy, x, norm)
    if branch is None or branch_norm is None:
        return g, sums, sums.new_empty(0)
    return g, sums, sums_reference(masked_dy, branch, branch_norm)


@operator("batch_norm_data_gradient")
def batch_norm_data_gradient(g: Tensor, x: Tensor, norm: Tensor, factors: Tensor | None) -> Tensor:
    """Returns dx = SCALE g + factors[0] (x - MEAN) + factors[1]; without factors, as in evaluation, SCALE g.

    g: like x, the gradient behind relu's mask. x, norm: as in `batch_norm`. factors: (2, C), of
    `norm_gradient`.
    """
    op = "batch_norm_data_gradient"
    c = check_images(op, "x", x)[1]
    check_images(op, "g", g, like=x)
    check_tensors(op, x.device, single_or_double(x), norm=(norm, (5, c)), factors=(factors, (2, c)))
    if runs_triton(x.device):
        return launch_gradient(g, x, None, norm, factors, False)
    return data_gradient_reference(g, x, norm, factors)


def setup_context(ctx, inputs, output):
    x, _, _, norm, residual, ctx.relu, ctx.batch = inputs
    ctx.joins = residual is not None
    # PyTorch's own operators would have to normalise again for the mask: there y, which is kept anyway, is cheaper.
    keeps_y = ctx.relu and (ctx.joins or not runs_triton(x.device))
    ctx.save_for_backward(x, norm, output if keeps_y else None)


def backward(ctx, dy):
    x, norm, y = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last)  # as it is where its consumer was one of these ops
    dx, d_gamma, d_beta, g = batch_norm_backward(dy, x, y, norm, ctx.relu, ctx.batch, ctx.joins and ctx.relu)
    d_residual = None if not ctx.joins else g if ctx.relu else dy
    return dx, d_gamma, d_beta, None, d_residual, None, None


batch_norm.register_autograd(backward, setup_context=setup_context)
