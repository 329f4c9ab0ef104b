"""Convolution, BatchNorm, addition and ReLU as one block, which hands on what is not normalised yet.

    y = conv_bn(x, self.conv1, self.bn1)        # Unnormalized: the convolution's output, and how to normalise it
    y = conv_bn(y, self.conv2, self.bn2)        # normalises y and applies ReLU as it loads
    y = conv_bn(y, self.conv3, self.bn3)
    return PendingAdd(y, activation(x))         # relu(normalised y + x), computed when somebody asks for it

Who reads an Unnormalized applies the rows of its `norm` and the ReLU while loading: a convolution, or `max_pool`. A 1x1
convolution that reads a PendingAdd adds, too, and writes the sum once, for the skip connection. `activation` makes an
ordinary tensor of any of them. A convolution's `algorithm` says how it is computed:
    torch                 PyTorch's operator, between the BatchNorms of `layers`
    triton                the project's kernels, which do all of this as they load and store
    triton-materialized   the same kernels on operands that are in memory. The activation a, which forward and the
                          weight's gradient read, and dy, which both gradients read, are each written once; sums, mask
                          and addition stay in the kernels' epilogues
    cudnn                 the library's convolution on the same operands, with passes of their own for the epilogues
    triton-gram           as triton-materialized, but a 1 x 1 that `widens` has BatchNorm's statistics from the Gram
                          matrix of a, before it is computed: y is in memory neither forward nor backward
    cudnn-gram            as cudnn, but as triton-gram where that is so, with the library's product for the weight
    triton-joint          as triton, but both gradients of a 1 x 1 are computed in one kernel, where there is one
Neighbours may differ: which is faster depends on the shape. All but `triton` and `triton-joint` keep a
beside x for backward.

Where BatchNorm is known before the convolution, which it is in evaluation without gradients and with a Gram matrix, the
convolution waits as a PendingConv until it is known whether ReLU or an addition follows, and the kernel then does all
of it as it stores. In training z is then a Rectified, as where a convolution has a bias instead of a BatchNorm:
z = conv_relu(x, self.conv1) is relu(y + bias), which the kernel writes instead of y. In backward the readers of a
Rectified apply the ReLU's mask as they store the gradient.

Backward has one convention. The gradient of an unnormalised tensor is that of its normalised value, behind the ReLU's
mask. The gradient of its `norm`, (5, C), has the rows FACTORS, D_GAMMA, D_BETA (`kernels.norm_rows`), which turn that
into dy. Both are linear, so autograd may add them up where a tensor has several readers. An ordinary operator would
compute wrong gradients from an unnormalised tensor; therefore Unnormalized, PendingConv and PendingAdd are no tensors,
and refuse to be taken for one. A Rectified's norm changes no value; D_BETA is the gradient of the bias, or of beta.
"""

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import kernels
from kernels.checks import empty_images
from kernels.conv_shape import conv_shape
from kernels.convolution_gradients import fits
from kernels.norm_rows import D_BETA, D_GAMMA, FACTORS, SCALE
from nvcnn.models import JOINT
from nvcnn.models.layers import BatchNorm2d, Conv2d

GRAM = ("triton-gram", "cudnn-gram")
MATERIALIZED = ("triton-materialized", "cudnn", *GRAM)  # a and dy are written before they are multiplied
LIBRARY = ("torch", "cudnn", "cudnn-gram")  # PyTorch's operators multiply, not the project's kernels

Geometry = tuple[tuple[int, ...], tuple[int, ...], int]  # stride, padding, groups
Gradients = tuple[Tensor, Tensor]


class Pending:
    """A value that is not computed yet. PyTorch's operators refuse it, and say what to do.

    `value`: the activation as an ordinary tensor, once it is in memory. `sparse`: every skip_stride-th pixel of it,
    both ways, once these are in memory for a skip connection that reads no other.
    """

    value: Tensor | None = None
    sparse: Tensor | None = None
    skip_stride: int = 1

    @classmethod
    def __torch_function__(cls, operator: Any, *_: Any) -> NoReturn:
        name = getattr(operator, "__name__", operator)
        raise TypeError(f"{name} takes a tensor, and {cls.__name__} is not normalised yet: give it activation(...)")


@dataclass
class Unnormalized(Pending):
    """A convolution's output y, (N, C, H, W), and the BatchNorm to come.

    `norm`: (5, C), from `kernels.batch_norm_statistics`; None where `bn` normalises y as an ordinary tensor.
    """

    y: Tensor
    bn: BatchNorm2d
    norm: Tensor | None = None


@dataclass
class PendingConv(Pending):
    """A convolution of x that is still to come, with BatchNorm in its epilogue.

    In evaluation that is the running statistics', and x an activation. In training `bn` takes the batch's from x, which
    may be unnormalised.
    """

    x: Tensor | Unnormalized
    conv: Conv2d
    bn: BatchNorm2d


@dataclass
class PendingAdd(Pending):
    """relu(normalised a + b), where b is an activation, or is normalised as well."""

    a: Unnormalized | PendingConv
    b: Tensor | Unnormalized | PendingConv


@dataclass
class Rectified(Pending):
    """z = relu(...), (N, C, H, W), whose gradient is handed back behind the ReLU's mask, with that of `norm`.

    `norm`: (5, C), under which z is what it is.
    """

    z: Tensor
    norm: Tensor


class Slice(NamedTuple):
    """What `concatenate` writes of a branch: x, or relu(normalised x) where there is a norm.

    gamma, beta, batch: of a norm that autograd does not know, as `kernels.batch_norm` takes them.
    """

    x: Tensor | PendingConv
    norm: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    batch: bool | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.x, Tensor):
            return tuple(self.x.shape)
        x, conv = activation(self.x.x), self.x.conv
        how: Any = x.shape, conv.weight_for(x), conv.stride, conv.padding, conv.groups
        return conv_shape("concatenate", *how).output

    def write(self, out: Tensor) -> Tensor:
        """Writes it to `out`, and returns what gets the gradient of that."""
        if isinstance(self.x, PendingConv):
            return compute(self.x, None, True, out)
        if self.norm is not None:
            return Written.apply(*self, out)
        with torch.no_grad():
            out.copy_(self.x)
        return self.x


Operand = Tensor | Unnormalized | PendingConv | PendingAdd | Rectified


def activation(x: Operand, skip_stride: int = 1) -> Tensor:
    """Returns x as an ordinary tensor, (N, C, H, W), channels-last, after its ReLU.

    skip_stride: as in `conv_bn`.
    """
    if isinstance(x, Tensor):
        return x
    if x.value is None:
        if isinstance(x, Rectified):
            x.value = Normalized.apply(x.z, x.norm, True)
        elif isinstance(x, PendingAdd) and isinstance(x.a, Unnormalized) and x.a.norm is not None:
            x.value, x.sparse = Materialize.apply(x.a.y, x.a.norm, *addend(x.b), True, skip_stride)
            x.skip_stride = skip_stride
        else:
            x.value = materialize(x.a, x.b, True) if isinstance(x, PendingAdd) else materialize(x, None, True)
    return x.value


def materialize(a: Unnormalized | PendingConv, b: Tensor | Unnormalized | PendingConv | None, relu: bool) -> Tensor:
    """Returns relu(normalised a + b) as an ordinary tensor; b may be None, and ReLU is optional."""
    if isinstance(a, Unnormalized) and a.norm is not None:
        return Materialize.apply(a.y, a.norm, *addend(b), relu)[0]
    if isinstance(a, PendingConv) and a.bn.training:
        return Normalized.apply(*normalized_conv(a, b, relu), relu)
    added = b if b is None or isinstance(b, Tensor) else materialize(b, None, False)
    return a.bn(a.y, residual=added, relu=relu) if isinstance(a, Unnormalized) else compute(a, added, relu)


def compute(a: PendingConv, added: Tensor | None, relu: bool, out: Tensor | None = None) -> Tensor:
    """Returns relu(normalised convolution + added), in evaluation; `added` may be None, and ReLU is optional.

    out: where the project's kernels write it.
    """
    x, conv, bn = activation(a.x), a.conv, a.bn
    if conv.algorithm in LIBRARY:
        return bn(channels_last(conv(x)), residual=added, relu=relu)
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    shift = torch.addcmul(bn.bias, bn.running_mean, scale, value=-1)
    epilogue = {"scale": scale, "shift": shift, "add": added, "relu": relu, "out": out}
    return kernels.convolution(x, conv.weight_for(x), conv.stride, conv.padding, conv.groups, **epilogue)[0]


def normalized_conv(a: PendingConv, b: Tensor | Unnormalized | PendingConv | None, relu: bool) -> tuple[Tensor, Tensor]:
    """Returns relu(normalised convolution + b), in training, and a norm that changes no value of it.

    b may be None, and ReLU is optional.
    """
    x = (a.x, None) if isinstance(a.x, Tensor) else (a.x.y, a.x.norm)
    # The epilogue adds what is normalised.
    added = (materialize(b, None, False), None) if isinstance(b, Unnormalized) else addend(b)
    of_bn = a.conv.weight_for(x[0]), a.bn.weight, a.bn.bias, a.conv, a.bn
    return GramConv.apply(*x, *added, *of_bn, relu)


def rectified(x: Operand) -> Rectified | None:
    """Returns x as a Rectified, if it is one, or becomes one, and is not an ordinary tensor yet."""
    if isinstance(x, Tensor) or x.value is not None:
        return None
    if isinstance(x, Rectified):
        return x
    a, b = (x.a, x.b) if isinstance(x, PendingAdd) else (x, None)
    return Rectified(*normalized_conv(a, b, True)) if isinstance(a, PendingConv) and a.bn.training else None


def addend(b: Tensor | Unnormalized | PendingConv | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns the tensor to add, and its norm where it is not normalised yet, or where that changes no value."""
    if b is None or isinstance(b, Tensor):
        return b, None
    if isinstance(b, PendingConv) and b.bn.training:
        return normalized_conv(b, None, False)
    return (b.y, b.norm) if isinstance(b, Unnormalized) and b.norm is not None else (materialize(b, None, False), None)


def conv_bn(x: Operand, conv: Conv2d, bn: BatchNorm2d, skip_stride: int = 1) -> Unnormalized | PendingConv:
    """Returns the convolution of x's activation, not normalised yet; where BatchNorm is known before, a PendingConv.

    skip_stride: of the 1 x 1 that also reads x, in the skip connection. Of a sum that is written here it then gets the
    pixels that it reads as a tensor of their own, and hands back their gradient alone: no zeros for the others.
    Raises ValueError for what the kernels do not have: dilation, a bias.
    """
    if conv.algorithm != "torch":
        check_supported(conv, bias=False)
    if not (bn.training or torch.is_grad_enabled()):
        return PendingConv(activation(x), conv, bn)
    if conv.algorithm == "torch":
        return Unnormalized(conv(activation(x)), bn)
    few = what_it_reads(conv, x)
    if few is not None:
        x, conv = few, without_stride(conv)
    if conv.algorithm in GRAM and bn.training and widens(conv):
        if not (isinstance(x, Unnormalized) and x.norm is not None and x.value is None and conv.stride == (1, 1)):
            x = activation(x)
        return PendingConv(x, conv, bn)
    a = x.a if isinstance(x, PendingAdd) and can_add(conv) else x
    tensors: tuple[Tensor | None, ...]
    z = rectified(x)
    if z is not None:
        tensors = z.z, z.norm, None, None
    elif isinstance(x, Tensor) or x.value is not None or not isinstance(a, Unnormalized) or a.norm is None:
        tensors = activation(x, skip_stride), None, None, None
    else:
        tensors = a.y, a.norm, *addend(x.b if isinstance(x, PendingAdd) else None)
    of_bn = conv.weight_for(tensors[0]), bn.weight, bn.bias, conv, bn
    y, norm, materialized, sparse = UnnormalizedConv.apply(*tensors, *of_bn, z is not None, skip_stride)
    if materialized is not None:
        assert not isinstance(x, Tensor)
        x.value, x.sparse, x.skip_stride = materialized, sparse, skip_stride  # for who else reads x
    return Unnormalized(y, bn, norm)


def conv_relu(x: Operand, conv: Conv2d) -> Tensor | Rectified:
    """Returns relu(convolution of x's activation + bias).

    Raises ValueError for what the kernels do not have: dilation, no bias.
    """
    if conv.algorithm == "torch":
        return F.relu(conv(activation(x)), inplace=True)
    check_supported(conv, bias=True)
    ready = rectified(x)
    x, x_norm = (activation(x), None) if ready is None else (ready.z, ready.norm)
    z, norm = RectifiedConv.apply(x, x_norm, conv.weight_for(x), conv.bias, conv)
    return Rectified(z, norm) if torch.is_grad_enabled() else z


def convolutions(x: Operand, layers: nn.Sequential) -> Tensor:
    """Returns what convolutions with bias and ReLU, and maximum poolings, make of x, one after another.

    An nn.ReLU in `layers` stands for that of the convolution before it.
    """
    for layer in layers:
        if isinstance(layer, Conv2d):
            x = conv_relu(x, layer)
        elif isinstance(layer, nn.MaxPool2d):
            window: Any = layer.kernel_size, layer.stride, layer.padding
            x = max_pool(x, *window)
    return activation(x)


def check_supported(conv: Conv2d, bias: bool) -> None:
    """Raises ValueError unless the kernels compute such a convolution."""
    numbers = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    if (conv.bias is not None) != bias or conv.dilation != (1, 1) or not numbers:
        op = "conv_relu" if bias else "conv_bn"
        raise ValueError(f"{op}: {conv}: dilation 1, padding with zeros in numbers and bias={bias} only")


def max_pool(x: Operand, kernel_size: int, stride: int, padding: int = 0, ceil_mode: bool = False) -> Tensor:
    """Returns the maxima of x's activation, as `kernels.max_pool` has them; an Unnormalized is not materialized."""
    window = kernel_size, stride, padding
    z = rectified(x)
    if z is not None:
        return MaxPool.apply(z.z, z.norm, True, ceil_mode, *window)
    if isinstance(x, Unnormalized) and x.norm is not None and x.value is None:
        return MaxPool.apply(x.y, x.norm, False, ceil_mode, *window)
    return kernels.max_pool(activation(x), *window, ceil_mode)


def concatenate(branches: Iterable[Operand]) -> Tensor:
    """Returns the activations of all, one behind the other in channels, (N, sum of C, H, W), channels-last.

    What is not normalised yet is written where it belongs at once, and its gradient is read from there; ordinary
    tensors are copied.
    """
    slices = [slice_of(branch) for branch in branches]
    ordinary = [slice.x for slice in slices if isinstance(slice.x, Tensor) and slice.norm is None]
    if len(ordinary) == len(slices):
        return torch.cat(ordinary, 1)
    shapes = [slice.shape for slice in slices]
    if len({(n, h, w) for n, _, h, w in shapes}) > 1:
        raise ValueError(f"concatenate: N, H and W must be the same, got {shapes}")
    (n, _, h, w), channels, x = shapes[0], [shape[1] for shape in shapes], slices[0].x
    z = empty_images(x if isinstance(x, Tensor) else activation(x.x), (n, sum(channels), h, w))
    parts = [slice.write(out) for slice, out in zip(slices, z.split(channels, 1), strict=True)]
    return Concatenate.apply(z, channels, *parts)


def slice_of(branch: Operand) -> Slice:
    """Returns what `concatenate` writes of a branch."""
    if isinstance(branch, Tensor) or branch.value is not None:
        return Slice(activation(branch))
    if isinstance(branch, Unnormalized):
        y, bn = branch.y, branch.bn
        if branch.norm is not None:
            return Slice(y, branch.norm)
        return Slice(y, bn.norm_of(y), bn.weight, bn.bias, bn.training)
    if isinstance(branch, PendingConv) and not branch.bn.training:
        if branch.conv.algorithm not in LIBRARY:
            return Slice(branch)
        if branch.conv.algorithm != "torch":
            y = channels_last(branch.conv(activation(branch.x)))
            return Slice(y, branch.bn.norm_of(y))
    return Slice(activation(branch))


def can_add(conv: Conv2d) -> bool:
    """Returns whether the kernel can add as it loads: each value of its input is loaded in one place."""
    return is_pointwise(conv) and conv.stride == (1, 1)


def widens(conv: Conv2d) -> bool:
    """Returns whether it is a 1 x 1 with more channels out than in, so that the Gram matrix of its input is narrow."""
    return is_pointwise(conv) and conv.in_channels < conv.out_channels


def is_pointwise(conv: Conv2d) -> bool:
    """Returns whether it is a 1 x 1, with any stride."""
    return conv.kernel_size == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def what_it_reads(conv: Conv2d, x: Operand) -> Tensor | None:
    """Returns the pixels of x that a 1 x 1 with a stride reads, if they are in memory as a tensor of their own."""
    if isinstance(x, Tensor) or not is_pointwise(conv) or conv.stride != (x.skip_stride,) * 2:
        return None
    return x.sparse


def without_stride(conv: Conv2d) -> Conv2d:
    """Returns the same 1 x 1, with the same weight, for the pixels that it reads."""
    conv = copy(conv)
    conv.stride = (1, 1)
    return conv


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
    """The maxima of relu(normalised x), which is never in memory; or where x is `rectified`, of x itself."""

    @staticmethod
    def forward(ctx, x, norm, rectified, ceil_mode, *window):
        through = None if rectified else norm
        y, argmax = kernels.max_pool_with_argmax(x, *window, ctx.needs_input_grad[0], through, ceil_mode)
        ctx.window = window
        ctx.save_for_backward(x, norm, argmax)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, norm, argmax = ctx.saved_tensors
        g, sums = kernels.max_pool_backward(dy, argmax, *x.shape[2:], *ctx.window, x, norm)
        return g, gradient_of_norm(sums, x, norm), *[None] * 5


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
    if g.is_cuda and g.dtype != torch.float32:
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
