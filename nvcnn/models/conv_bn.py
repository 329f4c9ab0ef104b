"""Convolution and BatchNorm (and addition, and ReLU) as one block that hands on what is not normalised yet.

    y = conv_bn(x, self.conv1, self.bn1)        # Raw: the convolution's output, and how to normalise it
    y = conv_bn(y, self.conv2, self.bn2)        # normalises and applies ReLU as it loads
    y = conv_bn(y, self.conv3, self.bn3)
    return Join(y, activation(x))               # relu(normalised y + x), when somebody asks

Who reads a Raw applies its BatchNorm's three vectors and the ReLU while loading; a 1x1 convolution that reads a Join
adds, too, and writes the sum once, for the skip connection. `activation` makes an ordinary tensor of any of them. How a
convolution is computed is its `algorithm`:
    torch                 PyTorch's operator, between the BatchNorms of `layers`
    triton                the project's kernels, which do all of this as they load and store
    triton-materialized   the same kernels on operands that are in memory: the activation a, which forward and the
                          weight's gradient read, and the gradient dy behind the BatchNorm, which both gradients read,
                          are each written once; sums, mask and addition stay in the kernels' epilogues
    cudnn                 the library's convolution on the same operands, with passes of their own for the epilogues
Neighbours may differ: which is faster depends on the shape. For backward, all but `triton` keep a beside the raw x.

In evaluation without gradients BatchNorm is known before the convolution: it waits, Folded, until it is known what else
comes behind it (ReLU, an addition), and the kernel then does all of it as it stores.

Backward has one convention. The gradient on a raw tensor is that of its normalised value, behind the ReLU's mask; the
gradient of its `vectors`, (5, C), is what turns it into the raw one's: rows FACTORS, D_GAMMA, D_BETA. Both are linear
in the gradient, so autograd may add them up where a raw tensor has several readers. An ordinary operator would get
wrong gradients from a raw tensor: Raw and Join are no tensors, and refuse to be taken for one.
"""

from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import kernels
from kernels.batch_norm import D_BETA, D_GAMMA, FACTORS
from nvcnn.models.layers import BatchNorm2d, Conv2d

MATERIALIZED = ("triton-materialized", "cudnn")  # a and dy are written before they are multiplied
LIBRARY = ("torch", "cudnn")  # PyTorch's operators multiply, not the project's kernels


class NotNormalised:
    """What PyTorch's operators refuse to take, with a word about what to do."""

    @classmethod
    def __torch_function__(cls, operator: Any, *_: Any) -> NoReturn:
        name = getattr(operator, "__name__", operator)
        raise TypeError(f"{name} takes a tensor, and {cls.__name__} is not normalised yet: give it activation(...)")


@dataclass
class Raw(NotNormalised):
    """A convolution's output y, (N, C, H, W), and the BatchNorm to come.

    `vectors`: (5, C), as of `kernels.batch_norm_statistics`; None where y is an ordinary tensor, for `bn` to normalise.
    """

    y: Tensor
    bn: BatchNorm2d
    vectors: Tensor | None = None
    value: Tensor | None = field(default=None, init=False)  # relu(normalised y), once it is in memory


@dataclass
class Folded(NotNormalised):
    """A convolution of x that is still to come, with the BatchNorm of running statistics folded into it."""

    x: Tensor
    conv: Conv2d
    bn: BatchNorm2d
    value: Tensor | None = field(default=None, init=False)  # relu(normalised y), once somebody asked


@dataclass
class Join(NotNormalised):
    """relu(normalised a + b), where b is an activation or is normalised as well."""

    a: Raw | Folded
    b: Tensor | Raw | Folded
    value: Tensor | None = field(default=None, init=False)


def activation(x: Tensor | Raw | Folded | Join) -> Tensor:
    """x as an ordinary tensor, (N, C, H, W), channels-last, behind its ReLU."""
    if isinstance(x, Tensor):
        return x
    if x.value is None:
        x.value = written(x.a, x.b, True) if isinstance(x, Join) else written(x, None, True)
    return x.value


def written(a: Raw | Folded, b: Tensor | Raw | Folded | None, relu: bool) -> Tensor:
    """normalised a + b, with or without the last two, in memory."""
    if isinstance(a, Raw) and a.vectors is not None:
        return Written.apply(a.y, a.vectors, *parts(b), relu)
    added = b if b is None or isinstance(b, Tensor) else written(b, None, False)
    return a.bn(a.y, residual=added, relu=relu) if isinstance(a, Raw) else folded(a, added, relu)


def folded(a: Folded, added: Tensor | None, relu: bool) -> Tensor:
    """relu(normalised convolution + added), with or without the last two."""
    x, conv, bn = a.x, a.conv, a.bn
    if conv.algorithm in LIBRARY:
        return bn(channels_last(conv(x)), residual=added, relu=relu)
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    shift = torch.addcmul(bn.bias, bn.running_mean, scale, value=-1)
    epilogue = {"scale": scale, "shift": shift, "add": added, "relu": relu}
    return kernels.convolution(x, conv.weight_for(x), conv.stride, conv.padding, conv.groups, **epilogue)[0]


def parts(b: Tensor | Raw | Folded | None) -> tuple[Tensor | None, Tensor | None]:
    """The tensor to add, and its vectors if it is raw."""
    if b is None or isinstance(b, Tensor):
        return b, None
    return (b.y, b.vectors) if isinstance(b, Raw) and b.vectors is not None else (written(b, None, False), None)


def conv_bn(x: Tensor | Raw | Folded | Join, conv: Conv2d, bn: BatchNorm2d) -> Raw | Folded:
    """The convolution of x's activation, raw, or Folded in evaluation without gradients.

    Raises ValueError for what the kernels do not have: dilation, a bias.
    """
    if conv.algorithm != "torch" and (
        conv.bias is not None
        or conv.dilation != (1, 1)
        or conv.padding_mode != "zeros"
        or isinstance(conv.padding, str)
    ):
        raise ValueError(f"conv_bn: {conv}: dilation 1, padding with zeros in numbers and bias=False only")
    if not (bn.training or torch.is_grad_enabled()):
        return Folded(activation(x), conv, bn)
    if conv.algorithm == "torch":
        return Raw(conv(activation(x)), bn)
    tensors: tuple[Tensor | None, ...]
    if isinstance(x, Raw) and x.value is None and x.vectors is not None:
        tensors = x.y, x.vectors, None, None
    elif isinstance(x, Join) and x.value is None and isinstance(x.a, Raw) and x.a.vectors is not None and joins(conv):
        tensors = x.a.y, x.a.vectors, *parts(x.b)
    else:
        tensors = activation(x), None, None, None
    y, vectors, a = RawConv.apply(*tensors, conv.weight_for(tensors[0]), bn.weight, bn.bias, conv, bn)
    if a is not None:
        assert isinstance(x, Raw | Join)
        x.value = a  # for who else reads x
    return Raw(y, bn, vectors)


def joins(conv: Conv2d) -> bool:
    """Whether the kernel can add as it loads: each value of its input is loaded in one place."""
    return conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


def apply_batch_norm(y: Tensor, vectors: Tensor, b: Tensor | None, b_vectors: Tensor | None, relu: bool) -> Tensor:
    """normalised y + b in memory; outside of autograd."""
    if b is not None and b_vectors is not None:
        b = apply_batch_norm(b, b_vectors, None, None, False)
    return kernels.batch_norm(y, vectors[0], vectors[0], vectors, b, relu, True)  # gamma and beta are in the vectors


def gradient_of_vectors(sums: Tensor | None, y: Tensor | None, vectors: Tensor | None) -> Tensor | None:
    """(5, C), of the sums that were taken with y; None where y is no raw tensor, or nobody asked."""
    if sums is None or y is None or vectors is None:
        return None
    return kernels.batch_norm_gradient_vectors(sums, vectors, y.numel() // y.shape[1])


def empty_gradient(weight: Tensor) -> Tensor:
    """Returns room for a weight's gradient: its slice, where `nvcnn.optimizer.gradients` waits for it there."""
    slice = getattr(weight, "gradient_slice", None)
    return torch.empty_like(weight) if slice is None else slice.detach()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class Written(Function):
    """normalised a + b, with or without b and ReLU, as an ordinary tensor."""

    @staticmethod
    def forward(ctx, a, a_vectors, b, b_vectors, relu):
        z = apply_batch_norm(a, a_vectors, b, b_vectors, relu)
        ctx.relu, ctx.adds = relu, b is not None
        raw_b = b if b_vectors is not None else None
        ctx.save_for_backward(a, a_vectors, raw_b, b_vectors, z if relu and ctx.adds else None)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, d_z):
        a, a_vectors, b, b_vectors, z = ctx.saved_tensors
        d_z = channels_last(d_z)
        g, sums = kernels.batch_norm_gradient_sums(d_z, a, z, a_vectors, ctx.relu)
        g = g if ctx.relu else d_z
        b_sums = None if b is None else kernels.batch_norm_gradient_sums(g, b, None, b_vectors, False)[1]
        d_vectors = gradient_of_vectors(sums, a, a_vectors), gradient_of_vectors(b_sums, b, b_vectors)
        return g, d_vectors[0], g if ctx.adds else None, d_vectors[1], None


class RawConv(Function):
    """y = conv(a), its BatchNorm's vectors, and a if it is written here: a is x, or relu(normalised x (+ b)).

    In evaluation the vectors are those of the running statistics, and dy = SCALE g.
    """

    @staticmethod
    def forward(ctx, x, x_vectors, b, b_vectors, weight, gamma, beta, conv, bn):
        ctx.set_materialize_grads(False)
        ctx.conv, ctx.batch, ctx.adds = conv, bn.training, b is not None
        center = bn.running_mean if bn.training else None
        read, prologue, a = x, (x_vectors, b, b_vectors), None
        if conv.algorithm in MATERIALIZED and x_vectors is not None:
            read = a = apply_batch_norm(x, *prologue, True)
            prologue = None, None, None
        if conv.algorithm in LIBRARY:
            y = channels_last(F.conv2d(read, weight, None, conv.stride, conv.padding, 1, conv.groups))
        else:
            y, joined, sums = kernels.convolution(
                read, weight, conv.stride, conv.padding, conv.groups, *prologue, center
            )
            a = joined if prologue[1] is not None else a
        written = bn.batch_mean, bn.batch_var, bn.eps
        if not bn.training:
            vectors = kernels.folded(bn.running_mean, bn.running_var, gamma, beta, bn.eps)
        elif conv.algorithm in LIBRARY:
            vectors = kernels.batch_norm_statistics(y, gamma, beta, *written)
        else:
            vectors = kernels.batch_norm_vectors(sums, center, y.numel() // y.shape[1], gamma, beta, *written)
        raw_b = None if b_vectors is None else b
        ctx.save_for_backward(x, x_vectors, raw_b, b_vectors, a, weight, y, vectors)
        return y, vectors, a

    @staticmethod
    @once_differentiable
    def backward(ctx, g, d_vectors, d_a):
        x, x_vectors, b, b_vectors, a, weight, y, vectors = ctx.saved_tensors
        conv = ctx.conv
        needs_x, needs_weight = ctx.needs_input_grad[0] or ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        geometry = conv.stride, conv.padding, conv.groups
        factors = d_vectors[FACTORS] if ctx.batch else None
        dy, through = channels_last(g), (y if ctx.batch else None, vectors, factors)
        if conv.algorithm in MATERIALIZED:
            dy, through = kernels.batch_norm_data_gradient(dy, y, vectors, factors), (None, None, None)
        # What was convolved: a where it is in memory, else x, which is normalised as it loads.
        read, read_vectors = (x, x_vectors) if a is None else (a, None)
        # The mask of a sum is that of a; any other is taken again from x, which the sums read anyway.
        raw_x = None if x_vectors is None else x
        epilogue = None if d_a is None else channels_last(d_a), a if ctx.adds else None, raw_x, x_vectors, b, b_vectors
        dx = sums = b_sums = dw = None
        if conv.algorithm in LIBRARY:
            how = conv.stride, conv.padding, [1, 1], False, [0, 0], conv.groups, [needs_x, needs_weight, False]
            dx, dw, _ = torch.ops.aten.convolution_backward(dy, read, weight, None, *how)
            if needs_x:
                dx, sums, b_sums = masked_with_sums(channels_last(dx), *epilogue)
        else:
            if needs_weight:
                dw = empty_gradient(weight)
                kernels.convolution_weight_gradient(dy, read, dw, *geometry, *through, read_vectors)
            if needs_x:
                size = x.shape[2:]
                dx, sums, b_sums = kernels.convolution_data_gradient(dy, weight, size, *geometry, *through, *epilogue)
        d_vectors_of = gradient_of_vectors(sums, raw_x, x_vectors), gradient_of_vectors(b_sums, b, b_vectors)
        d_b = dx if ctx.adds else None
        return dx, d_vectors_of[0], d_b, d_vectors_of[1], dw, d_vectors[D_GAMMA], d_vectors[D_BETA], None, None


def masked_with_sums(
    dx: Tensor,
    skip: Tensor | None,
    z: Tensor | None,
    x: Tensor | None,
    x_vectors: Tensor | None,
    b: Tensor | None,
    b_vectors: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The epilogue of `kernels.convolution_data_gradient` as passes of their own, on a dx that may be overwritten."""
    sums = b_sums = None
    dx = dx if skip is None else dx.add_(skip)
    if x is not None and x_vectors is not None:
        dx, sums = kernels.batch_norm_gradient_sums(dx, x, z, x_vectors, True)
    if b is not None and b_vectors is not None:
        b_sums = kernels.batch_norm_gradient_sums(dx, b, None, b_vectors, False)[1]
    return dx, sums, b_sums
