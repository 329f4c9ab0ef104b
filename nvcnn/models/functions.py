"""The autograd functions behind `fused.py`, and the gradients of its convolutions.

Backward has one convention. The gradient of an unnormalised tensor is that of its normalised value, behind the ReLU's
mask. The gradient of its `norm`, (5, C), has the rows FACTORS, D_GAMMA, D_BETA (`kernels.norm_rows`), which turn that
into dy. Both are linear, so autograd may add them up where a tensor has several readers. The readers of a Rectified
apply the ReLU's mask as they store the gradient; its norm changes no value, and D_BETA is the gradient of the bias, or
of beta.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import kernels
from kernels.convolution_gradients import fits
from kernels.norm_rows import D_BETA, D_GAMMA, FACTORS, SCALE
from nvcnn.models import JOINT
from nvcnn.models.layers import Conv2d

GRAM = ("triton-gram", "cudnn-gram")
MATERIALIZED = ("triton-materialized", "cudnn", *GRAM)  # a and dy are written before they are multiplied
LIBRARY = ("torch", "cudnn", "cudnn-gram")  # PyTorch's operators multiply, not the project's kernels

Geometry = tuple[tuple[int, ...], tuple[int, ...], int]  # stride, padding, groups
Gradients = tuple[Tensor, Tensor]


def can_add(conv: Conv2d) -> bool:
    """Returns whether the kernel can add as it loads: each value of its input is loaded in one place."""
    return is_pointwise(conv) and conv.stride == (1, 1)


def is_pointwise(conv: Conv2d) -> bool:
    """Returns whether it is a 1 x 1, with any stride."""
    return conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def every(z: Tensor, stride: int) -> Tensor | None:
    """Returns every stride-th pixel of z, both ways, as a tensor of their own; None if that is all of them."""
    return None if stride == 1 else kernels.max_pool_with_argmax(z, 1, stride, 0, False)[0]


def added_gradient(dense: Tensor | None, sparse: Tensor | None, stride: int) -> tuple[Tensor | None, int]:
    """Returns the gradient of z by its readers, of all of it and of every stride-th pixel, and the stride it is for."""
    if sparse is None:
        return dense if dense is None else channels_last(dense), 1
    if dense is None:
        return channels_last(sparse), stride
    dense = dense.clone(memory_format=torch.channels_last)
    dense[:, :, ::stride, ::stride] += sparse
    return dense, 1


def apply_batch_norm(y: Tensor, norm: Tensor, b: Tensor | None, b_norm: Tensor | None, relu: bool) -> Tensor:
    """Returns relu(normalised y + b) as an ordinary tensor, outside of autograd."""
    if b is not None and b_norm is not None:
        b = apply_batch_norm(b, b_norm, None, None, False)
    return kernels.batch_norm(y, norm[0], norm[0], norm, b, relu, True)  # norm has gamma and beta in it


def gradient_of_norm(sums: Tensor | None, y: Tensor | None, norm: Tensor | None) -> Tensor | None:
    """Returns the gradient of y's norm, (5, C), from the sums taken with y; None where there are none."""
    if sums is None or y is None or norm is None:
        return None
    return kernels.norm_gradient(sums, norm, y.numel() // y.shape[1])


def empty_gradient(weight: Tensor) -> Tensor:
    """Returns room for a weight's gradient: its slice, where `nvcnn.optimizer.gradients` waits for it there."""
    slice = getattr(weight, "gradient_slice", None)
    return torch.empty_like(weight) if slice is None else slice.detach()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class Normalized(Function):
    """x itself, whose norm changes no value, as an ordinary tensor; `relu`: it is relu of something."""

    @staticmethod
    def forward(ctx, x, norm, relu):
        ctx.relu = relu
        ctx.save_for_backward(x, norm)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, d_x):
        x, norm = ctx.saved_tensors
        d_x = channels_last(d_x)
        g, sums, _ = kernels.batch_norm_gradient_sums(d_x, x, None, norm, ctx.relu)
        return g if ctx.relu else d_x, gradient_of_norm(sums, x, norm), None


class Materialize(Function):
    """relu(normalised a + b) as an ordinary tensor; b may be None, and ReLU is optional. And `every` of it."""

    @staticmethod
    def forward(ctx, a, a_norm, b, b_norm, relu, skip_stride=1):
        z = apply_batch_norm(a, a_norm, b, b_norm, relu)
        ctx.relu, ctx.adds, ctx.skip_stride = relu, b is not None, skip_stride
        raw_b = b if b_norm is not None else None
        ctx.save_for_backward(a, a_norm, raw_b, b_norm, z if relu and ctx.adds else None)
        return z, every(z, skip_stride)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_z, skip):
        a, a_norm, b, b_norm, z = ctx.saved_tensors
        d_z, skip = channels_last(d_z), skip if skip is None else channels_last(skip)
        more = skip, b, b_norm, ctx.skip_stride
        g, sums, b_sums = kernels.batch_norm_gradient_sums(d_z, a, z, a_norm, ctx.relu, *more)
        g = g if ctx.relu else d_z
        d_norm = gradient_of_norm(sums, a, a_norm), gradient_of_norm(b_sums, b, b_norm)
        return g, d_norm[0], g if ctx.adds else None, d_norm[1], None, None


class Written(Function):
    """relu(normalised x) of a Slice, in `out`; what is returned has no values, and is there for its gradient."""

    @staticmethod
    def forward(ctx, x, norm, gamma, beta, batch, out):
        kernels.batch_norm_into(x, norm, True, out)
        ctx.batch = batch
        ctx.save_for_backward(x, norm)
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, norm = ctx.saved_tensors
        if ctx.batch is None:
            g, sums, _ = kernels.batch_norm_gradient_sums(d_out, x, None, norm, True)
            return g, gradient_of_norm(sums, x, norm), *[None] * 4
        dx, d_gamma, d_beta, _ = kernels.batch_norm_backward(d_out, x, None, norm, True, ctx.batch, False)
        return dx, None, d_gamma, d_beta, None, None


class Concatenate(Function):
    """z, whose slices of channels are written; `parts` get those of its gradient, as they lie there."""

    @staticmethod
    def forward(ctx, z, channels, *parts):
        ctx.channels = channels
        ctx.mark_dirty(z)  # else it would be a view, which others may not change
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, d_z):
        return None, None, *channels_last(d_z).split(ctx.channels, 1)


class MaxPool(Function):
    """The maxima of relu(normalised x), which is never in memory; or of x itself, which may be `rectified`.

    With `out` they are there, and what is returned has no values, and is there for its gradient.
    """

    @staticmethod
    def forward(ctx, x, norm, rectified, ceil_mode, window, out):
        through = None if rectified else norm
        how = *window, ctx.needs_input_grad[0], through, ceil_mode
        if out is None:
            y, argmax = kernels.max_pool_with_argmax(x, *how)
        else:
            y, argmax = x.new_empty(()).expand(out.shape), kernels.max_pool_into(x, *how, out)
        ctx.size, ctx.window = x.shape[2:], window
        ctx.save_for_backward(None if norm is None else x, norm, argmax)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, norm, argmax = ctx.saved_tensors
        g, sums = kernels.max_pool_backward(dy, argmax, *ctx.size, *ctx.window, x, norm)
        return g, gradient_of_norm(sums, x, norm), *[None] * 4


class UnnormalizedConv(Function):
    """y = conv(a), its BatchNorm's norm, and a where it is written here: a is x, or relu(normalised x (+ b)).

    In evaluation the norm is that of the running statistics, and dy = SCALE g. Of an x that is `rectified` x_norm
    changes no value, and a is x. With a comes `every` of it.
    """

    @staticmethod
    def forward(ctx, x, x_norm, b, b_norm, weight, gamma, beta, conv, bn, rectified, skip_stride):
        ctx.set_materialize_grads(False)
        ctx.conv, ctx.batch, ctx.adds, ctx.rectified = conv, bn.training, b is not None, rectified
        ctx.skip_stride = skip_stride
        center = bn.running_mean if bn.training else None
        read, prologue, a = x, (x_norm, b, b_norm), None
        if rectified:
            a, prologue = x, (None, None, None)
        elif conv.algorithm in MATERIALIZED and x_norm is not None:
            read = a = apply_batch_norm(x, *prologue, True)
            prologue = None, None, None
        if conv.algorithm in LIBRARY:
            y = channels_last(F.conv2d(read, weight, None, conv.stride, conv.padding, 1, conv.groups))
        else:
            y, joined, sums = kernels.convolution(
                read, weight, conv.stride, conv.padding, conv.groups, *prologue, center
            )
            a = joined if prologue[1] is not None else a
        statistics = bn.batch_mean, bn.batch_var, bn.eps
        if not bn.training:
            norm = kernels.norm_of(bn.running_mean, bn.running_var, gamma, beta, bn.eps)
        elif conv.algorithm in LIBRARY:
            norm = kernels.batch_norm_statistics(y, gamma, beta, *statistics)
        else:
            norm = kernels.norm_from_sums(sums, center, y.numel() // y.shape[1], gamma, beta, *statistics)
        raw_b = None if b_norm is None else b
        ctx.save_for_backward(x, x_norm, raw_b, b_norm, a, weight, y, norm)
        return y, norm, a, None if a is None else every(a, skip_stride)

    @staticmethod
    @once_differentiable
    def backward(ctx, g, d_norm, d_a, d_sparse):
        x, x_norm, b, b_norm, a, weight, y, norm = ctx.saved_tensors
        conv = ctx.conv
        needs_x, needs_weight = ctx.needs_input_grad[0] or ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        factors = d_norm[FACTORS] if ctx.batch else None
        dy, through = channels_last(g), (y if ctx.batch else None, norm, factors)
        if conv.algorithm in MATERIALIZED:
            dy, through = kernels.batch_norm_data_gradient(dy, y, norm, factors), (None, None, None)
        # What was convolved: a where it is in memory, else x, which is normalised as it loads.
        read, read_norm = (x, x_norm) if a is None else (a, None)
        # The mask of a sum is that of a; any other is taken again from x, which the sums read anyway.
        raw_x = None if x_norm is None else x
        skip, skip_stride = added_gradient(d_a, d_sparse, ctx.skip_stride)
        epilogue = skip, a if ctx.adds else None, raw_x, x_norm, b, b_norm
        how = (needs_x, needs_weight), ctx.rectified, skip_stride
        dx, sums, b_sums, dw = conv_gradients(conv, dy, through, read, read_norm, weight, epilogue, *how)
        d_norms = gradient_of_norm(sums, raw_x, x_norm), gradient_of_norm(b_sums, b, b_norm)
        d_b = dx if ctx.adds else None
        return dx, d_norms[0], d_b, d_norms[1], dw, d_norm[D_GAMMA], d_norm[D_BETA], *[None] * 4


class GramConv(Function):
    """z = relu(normalised conv(a) + b), where a is x, or relu(normalised x), and a norm that changes no value of z.

    b may be None, and ReLU is optional. b_norm: one that changes no value, or None. y is nowhere in memory.
    """

    @staticmethod
    def forward(ctx, x, x_norm, b, b_norm, weight, gamma, beta, conv, bn, relu):
        a, gram = kernels.gram_matrix(x, conv.stride, x_norm)
        a = x if x_norm is None else a
        read = strided(a, conv)
        pixels = read.numel() // read.shape[1]
        statistics = bn.batch_mean, bn.batch_var, bn.eps
        norm, shift, spread = kernels.gram_norm(gram, pixels, weight, gamma, beta, *statistics)
        epilogue = {"scale": norm[SCALE.value], "shift": shift, "add": b, "relu": relu}
        z, _, _ = kernels.convolution(a, weight, conv.stride, conv.padding, **epilogue)
        ctx.conv, ctx.pixels, ctx.adds, ctx.of_b = conv, pixels, b is not None, b_norm is not None
        ctx.save_for_backward(None if x_norm is None else x, x_norm, a, weight, norm, gram, spread)
        return z, conv.unit_norm.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, g, d_norm):
        x, x_norm, a, weight, norm, gram, spread = ctx.saved_tensors
        conv, g, d_beta = ctx.conv, channels_last(g), d_norm[D_BETA]
        geometry = conv.stride, conv.padding, conv.groups
        if conv.algorithm in LIBRARY:
            products = product_in_single(g, strided(a, conv)).view_as(weight)
        else:
            products = torch.empty_like(weight, dtype=norm.dtype)
            kernels.convolution_weight_gradient(g, a, products, *geometry)
        dw = empty_gradient(weight)
        of_y = norm, gram, spread, ctx.pixels
        d_gamma, of_g, of_a, affine = kernels.gram_gradient(products, d_beta, *of_y, weight, dw)
        second = {"a": a, "of_a": of_a, "affine": affine}
        dx, sums, _ = kernels.convolution_data_gradient(g, of_g, a.shape[2:], *geometry, x=x, x_norm=x_norm, **second)
        d_b = (g if ctx.adds else None), (d_norm.clone() if ctx.of_b else None)  # two parameters keep a row each
        return dx, gradient_of_norm(sums, x, x_norm), *d_b, dw, d_gamma, d_beta, None, None, None


class RectifiedConv(Function):
    """z = relu(conv(x) + bias), and its norm. x_norm: of an x that is Rectified itself, else None."""

    @staticmethod
    def forward(ctx, x, x_norm, weight, bias, conv):
        ctx.set_materialize_grads(False)
        ctx.conv = conv
        geometry = conv.stride, conv.padding, conv.groups
        if conv.algorithm in LIBRARY:
            y = channels_last(F.conv2d(x, weight, None, conv.stride, conv.padding, 1, conv.groups))
            z = y.add_(bias.to(y.dtype).view(-1, 1, 1)).relu_()
        else:
            z = kernels.convolution(x, weight, *geometry, shift=bias, relu=True)[0]
        ctx.save_for_backward(x, x_norm, weight)
        return z, conv.unit_norm.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, g, d_norm):
        x, x_norm, weight = ctx.saved_tensors
        needs_x, _, needs_weight, *_ = ctx.needs_input_grad
        epilogue = None, None, None if x_norm is None else x, x_norm, None, None
        stored = (None, None, None), x, None  # dy and what was convolved are in memory
        needs = needs_x, needs_weight
        rectified = x_norm is not None
        dx, sums, _, dw = conv_gradients(ctx.conv, channels_last(g), *stored, weight, epilogue, needs, rectified)
        return dx, gradient_of_norm(sums, x, x_norm), dw, None if d_norm is None else d_norm[D_BETA], None


def conv_gradients(
    conv: Conv2d,
    dy: Tensor,
    through: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    x_norm: Tensor | None,
    weight: Tensor,
    epilogue: tuple[Tensor | None, ...],
    needs: tuple[bool, bool],
    rectified: bool,
    skip_stride: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Returns dx, its sums and those of the branch behind the epilogue, and dw; None for what is not needed.

    through, x_norm, epilogue, skip_stride: as the kernels of the two gradients take them. needs: dx, dw. rectified: the
    x of the epilogue is, so that it is its own mask, and only the sum of dx counts.
    """
    geometry: Any = conv.stride, conv.padding, conv.groups
    dx = sums = branch_sums = dw = None
    if conv.algorithm in LIBRARY:
        dx, dw = library_gradients(dy, x, weight, geometry, needs)
        if needs[0]:
            dx, sums, branch_sums = masked_with_sums(channels_last(dx), *epilogue, skip_stride=skip_stride)
        return dx, sums, branch_sums, dw
    if conv.algorithm == JOINT and all(needs) and skip_stride == 1 and can_join(conv, dy, through, x_norm, epilogue):
        skip, _, raw_x, norm_of_x, *_ = epilogue
        dw, of_x = empty_gradient(weight), (norm_of_x, rectified, skip)
        dx, sums = kernels.convolution_gradients(dy, raw_x, weight, dw, *through, *of_x)
        return dx, sums, branch_sums, dw
    if needs[1]:
        dw = empty_gradient(weight)
        kernels.convolution_weight_gradient(dy, x, dw, *geometry, *through, x_norm)
    if needs[0]:
        if rectified:
            epilogue = epilogue[0], x
        how = x.shape[2:], *geometry, *through, *epilogue
        dx, sums, branch_sums = kernels.convolution_data_gradient(dy, weight, *how, skip_stride=skip_stride)
    return dx, sums, branch_sums, dw


def can_join(
    conv: Conv2d,
    dy: Tensor,
    through: tuple[Tensor | None, ...],
    x_norm: Tensor | None,
    epilogue: tuple[Tensor | None, ...],
) -> bool:
    """Returns whether one kernel computes both gradients. Arguments as in `conv_gradients`."""
    skip, z, raw_x, _, branch, _ = epilogue
    given = through[0] is not None and raw_x is not None and (skip is None or x_norm is None)
    alone = z is None and branch is None
    return given and alone and can_add(conv) and fits(conv.out_channels, conv.in_channels, dy.dtype)


def strided(a: Tensor, conv: Conv2d) -> Tensor:
    """Returns the pixels of a that a 1 x 1 convolution reads."""
    return a[:, :, :: conv.stride[0], :: conv.stride[1]]


def product_in_single(g: Tensor, a: Tensor) -> Tensor:
    """Returns g^T a, (K, C), over all pixels; of halves in fp32, as BatchNorm's share is a difference of such sums."""
    g, a = (channels_last(t).permute(0, 2, 3, 1).flatten(0, 2) for t in (g, a))
    if g.device.type != "cpu" and g.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(g.T, a, out_dtype=torch.float32)
    wide = torch.promote_types(g.dtype, torch.float32)
    return g.T.to(wide) @ a.to(wide)


def library_gradients(dy: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs: tuple[bool, bool]) -> Gradients:
    """Returns the gradients of x and of the weight by PyTorch's operator; None for what is not needed."""
    stride, padding, groups = geometry
    how = stride, padding, [1, 1], False, [0, 0], groups, [*needs, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(dy, x, weight, None, *how)
    return dx, dw


def masked_with_sums(
    dx: Tensor,
    skip: Tensor | None,
    z: Tensor | None,
    x: Tensor | None,
    x_norm: Tensor | None,
    b: Tensor | None,
    b_norm: Tensor | None,
    *,
    skip_stride: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns what the epilogue of `kernels.convolution_data_gradient` would; overwrites dx."""
    if x is None or x_norm is None:
        if skip is not None:
            dx[:, :, ::skip_stride, ::skip_stride] += skip
        return dx, None, None
    return kernels.batch_norm_gradient_sums(dx, x, z, x_norm, True, skip, b, b_norm, skip_stride)
