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
Neighbours may differ: which is faster depends on the shape. All but `triton` and `triton-joint` keep a beside x for
backward.

Where BatchNorm is known before the convolution, which it is in evaluation without gradients and with a Gram matrix, the
convolution waits as a PendingConv until it is known whether ReLU or an addition follows, and the kernel then does all
of it as it stores. In training z is then a Rectified, as where a convolution has a bias instead of a BatchNorm:
z = conv_relu(x, self.conv1) is relu(y + bias), which the kernel writes instead of y.

An ordinary operator would compute wrong gradients from an unnormalised tensor (`functions.py` says what they are here);
therefore Unnormalized, PendingConv and PendingAdd are no tensors, and refuse to be taken for one.
"""

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from kernels.checks import empty_images
from kernels.conv_shape import conv_shape
from kernels.max_pool import output_size
from nvcnn.models.functions import (
    GRAM,
    LIBRARY,
    Concatenate,
    GramConv,
    Materialize,
    MaxPool,
    Normalized,
    RectifiedConv,
    UnnormalizedConv,
    Written,
    can_add,
    channels_last,
    is_pointwise,
)
from nvcnn.models.layers import BatchNorm2d, Conv2d


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


@dataclass
class PendingPool(Pending):
    """The maxima of windows of x, (N, C, H, W), still to come; of relu(normalised x) where there is a norm.

    norm: (5, C), or None. rectified: x is, so that the norm changes no value. window: kernel size, stride, padding.
    """

    x: Tensor
    norm: Tensor | None
    rectified: bool
    window: tuple[int, int, int]
    ceil_mode: bool

    @property
    def shape(self) -> tuple[int, ...]:
        n, c, *size = self.x.shape
        return n, c, *(output_size(extent, *self.window, self.ceil_mode) for extent in size)

    def write(self, out: Tensor | None) -> Tensor:
        """Returns it as an ordinary tensor; with `out` writes it there, and returns what gets the gradient of that."""
        if self.norm is None and out is None:
            return kernels.max_pool(self.x, *self.window, self.ceil_mode)
        return MaxPool.apply(self.x, self.norm, self.rectified, self.ceil_mode, self.window, out)


class Slice(NamedTuple):
    """What `concatenate` writes of a branch: x, or relu(normalised x) where there is a norm.

    gamma, beta, batch: of a norm that autograd does not know, as `kernels.batch_norm` takes them.
    """

    x: Tensor | PendingConv | PendingPool
    norm: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    batch: bool | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        if not isinstance(self.x, PendingConv):
            return tuple(self.x.shape)
        x, conv = activation(self.x.x), self.x.conv
        how: Any = x.shape, conv.weight_for(x), conv.stride, conv.padding, conv.groups
        return conv_shape("concatenate", *how).output

    def write(self, out: Tensor) -> Tensor:
        """Writes it to `out`, and returns what gets the gradient of that."""
        if isinstance(self.x, PendingConv):
            return compute(self.x, None, True, out)
        if isinstance(self.x, PendingPool):
            return self.x.write(out)
        if self.norm is not None:
            return Written.apply(*self, out)
        with torch.no_grad():
            out.copy_(self.x)
        return self.x


Operand = Tensor | Unnormalized | PendingConv | PendingAdd | PendingPool | Rectified


def activation(x: Operand, skip_stride: int = 1) -> Tensor:
    """Returns x as an ordinary tensor, (N, C, H, W), channels-last, after its ReLU.

    skip_stride: as in `conv_bn`.
    """
    if isinstance(x, Tensor):
        return x
    if x.value is None:
        if isinstance(x, Rectified):
            x.value = Normalized.apply(x.z, x.norm, True)
        elif isinstance(x, PendingPool):
            x.value = x.write(None)
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
    return activation(pooling(x, kernel_size, stride, padding, ceil_mode))


def pooling(x: Operand, kernel_size: int, stride: int, padding: int = 0, ceil_mode: bool = False) -> PendingPool:
    """Returns what `max_pool` would, not computed yet."""
    how = (kernel_size, stride, padding), ceil_mode
    z = rectified(x)
    if z is not None:
        return PendingPool(z.z, z.norm, True, *how)
    if isinstance(x, Unnormalized) and x.norm is not None and x.value is None:
        return PendingPool(x.y, x.norm, False, *how)
    return PendingPool(activation(x), None, False, *how)


def concatenate(branches: Iterable[Operand]) -> Tensor:
    """Returns the activations of all, one behind the other in channels, (N, sum of C, H, W), channels-last.

    What is not normalised or pooled yet is written where it belongs at once, and its gradient is read from there;
    ordinary tensors are copied.
    """
    slices = [slice_of(branch) for branch in branches]
    if all(slice.norm is None and not isinstance(slice.x, PendingConv) for slice in slices):
        return torch.cat([activation(slice.x) for slice in slices], 1)
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
    if isinstance(branch, PendingPool):
        return Slice(branch)
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


def widens(conv: Conv2d) -> bool:
    """Returns whether it is a 1 x 1 with more channels out than in, so that the Gram matrix of its input is narrow."""
    return is_pointwise(conv) and conv.in_channels < conv.out_channels


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
