"""A model run on tensors without memory: order of its gradients, places of its convolutions, bytes it keeps, MACs.

Nothing is computed, and the model is left alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from nvcnn.models.functions import GRAM
from nvcnn.models.fused import widens
from nvcnn.models.layers import Conv2d, outputs


def on_meta(
    model: nn.Module, batch_size: int, image_size: int, dtype: torch.dtype, channels: int = 3
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the model's state as it would be in `dtype`, and a batch of images, both without memory.

    They are for `functional_call`.
    """

    state = {name: torch.empty_like(t, device="meta") for name, t in model.named_buffers()}
    for name, t in model.named_parameters():
        like = torch.empty_like(t, device="meta", dtype=dtype if t.dim() >= 2 else t.dtype)
        state[name] = like.requires_grad_(t.requires_grad)
    images = torch.empty(batch_size, channels, image_size, image_size, dtype=dtype, device="meta")
    return state, images.to(memory_format=torch.channels_last)


def gradient_order(model: nn.Module, image_size: int) -> list[str]:
    """Returns the names of the parameters in the order in which backward finishes their gradients.

    The model must be in training mode.
    """
    state, images = on_meta(model, 2, image_size, torch.float32)
    order: list[str] = []
    for name, tensor in state.items():
        if tensor.requires_grad:
            tensor.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    torch.autograd.backward([logits.sum() for logits in outputs(functional_call(model, state, images))])
    return order


def check_batch(model: nn.Module, batch_size: int, image_size: int) -> None:
    """Raises ValueError unless each BatchNorm in training mode gets two values a channel, or more."""
    functional_call(model, *on_meta(model, batch_size, image_size, torch.float32))


def activation_bytes(model: nn.Module, batch_size: int, image_size: int, dtype: torch.dtype) -> int:
    """Returns the bytes that autograd keeps from forward for backward, images included, parameters not.

    The weights count as if they were in `dtype`; ops keep what their Triton kernels do. This is an estimate from below:
    the gradients that backward holds at a time, cuDNN's workspaces and the allocator's rounding come on top.
    """
    state, images = on_meta(model, batch_size, image_size, dtype)
    saved: dict[int, torch.UntypedStorage] = {}  # by identity; held, so that no identity is given out twice

    def pack(t: Tensor) -> Tensor:
        saved[id(t.untyped_storage())] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        functional_call(model, state, images)
    for t in state.values():
        saved.pop(id(t.untyped_storage()), None)
    return sum(storage.nbytes() for storage in saved.values())


def macs(model: nn.Module, image_size: int) -> int:
    """Returns the multiplications, each with its addition, of the model's forward pass on an image.

    The model must be in evaluation mode.
    """
    state, images = on_meta(model, 1, image_size, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        functional_call(model, state, images)
    return counter.get_total_flops() // 2


GRAM_ADDS, GRAM_RELU, GRAM_ALONE = "gram, adding", "gram, relu", "gram"


class Place(NamedTuple):
    """A convolution as a training step, or an evaluation, meets it: two with equal places take the same time."""

    x: tuple[int, int, int, int]  # N, C, H, W
    weight: tuple[int, int, int, int]  # K, C / groups, R, S
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    dtype: torch.dtype
    reads: str  # an activation, rectified or not, a raw tensor, or a join of a raw tensor with one or another
    gradient: bool  # x has one
    folded: str = ""  # in evaluation, what the epilogue does: "folded", or "folded, adding" an activation
    bias: bool = False  # and ReLU follow, not a BatchNorm
    gram: str = ""  # in training with a Gram matrix, what the epilogue does: GRAM_ADDS, GRAM_RELU or GRAM_ALONE
    skip_stride: int = 1  # others read every so many-th pixel of what it hands on

    @property
    def hands_on(self) -> bool:
        """Returns whether others read the activation from it: a join that it writes, or what it reads as rectified."""
        return self.reads.startswith("join") or (self.reads == "rectified" and not self.bias)

    @property
    def y(self) -> tuple[int, int, int, int]:
        """Returns the shape of the output: N, K, OH, OW."""
        sizes = zip(self.x[2:], self.padding, self.weight[2:], self.stride, strict=True)
        oh, ow = ((size + 2 * padding - taps) // stride + 1 for size, padding, taps, stride in sizes)
        return self.x[0], self.weight[0], oh, ow

    def __str__(self) -> str:
        sizes = ("x".join(map(str, numbers)) for numbers in (self.x, self.weight, self.stride, self.padding))
        words = "x {} weight {} stride {} padding {}".format(*sizes)
        words += f" groups {self.groups} {str(self.dtype).removeprefix('torch.')} {self.reads}" + " bias" * self.bias
        words += f" {self.gram}" if self.gram else ""
        words += f" skip stride {self.skip_stride}" if self.skip_stride > 1 else ""
        return words + (f", {self.folded}" if self.folded else "" if self.gradient else ", without its gradient")


class Places(TorchDispatchMode):
    """Records the place of each convolution op, by the identity of its weight."""

    def __init__(self, training: bool) -> None:
        super().__init__()
        self.training = training
        self.found: dict[int, Place] = {}
        self.rectified: list[torch.UntypedStorage] = []  # what is read as such
        self.multiplied: dict[int, tuple[torch.UntypedStorage, str, bool]] = {}  # what has a Gram matrix; by identity
        self.padded: list[tuple[Tensor, Tensor]] = []  # weights, and what stands for them
        self.handed_on: torch.UntypedStorage | None = None  # what the last convolution hands on

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten.constant_pad_nd.default:
            self.padded.append((args[0], result))
        if func is kernels.gram_matrix.overload:
            self.note_gram(result[0], *args, **kwargs)
        if func is kernels.convolution.overload:
            self.note(result, *args, **kwargs)
        if func is kernels.max_pool_with_argmax.overload:
            self.note_sparse(*args)
        return result

    def note_sparse(self, x, kernel_size, stride, *_):
        """Windows of one pixel are what a skip connection reads of the activation that a convolution hands on."""
        if kernel_size == 1 and self.handed_on is not None and self.handed_on._cdata == x.untyped_storage()._cdata:
            name, place = self.found.popitem()
            self.found[name] = place._replace(skip_stride=stride)

    def note_gram(self, a, x, stride, norm=None):
        storage = (x if norm is None else a).untyped_storage()
        self.multiplied[storage._cdata] = storage, "activation" if norm is None else "raw", x.requires_grad

    def note(
        self, results, x, weight, stride, padding, groups=1, norm=None, residual=None, residual_norm=None,
        center=None, scale=None, shift=None, add=None, relu=False, out=None,
    ):  # fmt: skip
        y, joined, _ = results
        reads = "raw" if norm is not None else "activation"
        if residual is not None:
            reads = "join" if residual_norm is None else "join of two"
        bias, gradient, gram = scale is None and shift is not None, x.requires_grad, ""
        storage = next((z for z in self.rectified if z._cdata == x.untyped_storage()._cdata), None)
        if storage is not None and self.training and (bias or center is not None):
            reads = "rectified"
        if storage is not None and center is not None:
            self.rectified.remove(storage)  # others get what this convolution hands on, an activation
        if self.training and scale is not None:
            _, reads, gradient = self.multiplied[x.untyped_storage()._cdata]
            gram = GRAM_ADDS if add is not None else GRAM_RELU if relu else GRAM_ALONE
        if bias or (gram and relu):
            self.rectified.append(y.untyped_storage())
        folded = "" if self.training else "folded" if add is None else "folded, adding"
        geometry = tuple(x.shape), tuple(weight.shape), tuple(stride), tuple(padding), groups
        of = next((original for original, padded in self.padded if padded is weight), weight)
        self.found[id(of)] = place = Place(*geometry, x.dtype, reads, gradient, folded, bias, gram)
        self.handed_on = (x if residual is None else joined).untyped_storage() if place.hands_on else None


def places(
    model: nn.Module, batch_size: int, image_size: int, dtype: torch.dtype, channels: int = 3, gram: bool = False
) -> dict[str, Place]:
    """Returns the place of each convolution of `conv_bn` and `conv_relu`, by its name in the model, in their order.

    It is that of a training step, or of an evaluation, as the model's mode is. gram: all that can be are computed
    with a Gram matrix, which changes their places, and those of who reads them.
    """
    convolutions = [module for module in model.modules() if isinstance(module, Conv2d)]
    before = [conv.algorithm for conv in convolutions]
    state, images = on_meta(model, batch_size, image_size, dtype, channels)
    try:
        for conv in convolutions:
            conv.algorithm = GRAM[0] if gram and widens(conv) else "triton"
        with torch.set_grad_enabled(model.training), Places(model.training) as recorded:
            functional_call(model, state, images)
    finally:
        for conv, algorithm in zip(convolutions, before, strict=True):
            conv.algorithm = algorithm
    names = {id(tensor): name.removesuffix(".weight") for name, tensor in state.items()}
    return {names[weight]: place for weight, place in recorded.found.items()}
