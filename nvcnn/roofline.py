"""What a training step calls, the bytes and FLOPs of each call, and how long GPUs take for them at least.

The GPUs need not be here: the step is the trainer's own, on tensors of the meta device, without memory. Every call
moves the bytes of its tensors and does its FLOPs. Its floor is the bytes over the bandwidth or the FLOPs over the
matrix rate, whichever is longer. No implementation with these calls takes less than the sum of the floors; fusing calls
moves the limit.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_leaves
from torch.utils.flop_counter import flop_registry

from kernels.configurations import cdiv
from nvcnn.data.batch import Batch, MixedBatch
from nvcnn.distributed import Transport
from nvcnn.kernel_choices import choose_algorithms
from nvcnn.program import Launch
from nvcnn.step import Step

META = torch.device("meta")
aten = torch.ops.aten


class Layout(NamedTuple):
    """Describes a tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Returns the bytes in memory, where an expanded dimension is there once."""
        return prod(n for n, stride in zip(self.shape, self.stride, strict=True) if stride) * self.dtype.itemsize

    def meta(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=META)


@dataclass(frozen=True)
class Call:
    """Holds an operator and what it was called with: arguments by name, and tensors as their layouts.

    Equal calls do the same.
    """

    op: torch._ops.OpOverload
    arguments: tuple[tuple[str, Any], ...]
    outputs: tuple[Layout, ...] = ()

    @property
    def name(self) -> str:
        return self.op._schema.name

    def __getitem__(self, argument: str) -> Any:
        return dict(self.arguments).get(argument)


def layouts(value: Any) -> Any:
    """Returns the value in hashable form, with its tensors as layouts and its lists as tuples."""
    if isinstance(value, list | tuple):
        return tuple(map(layouts, value))
    return Layout(tuple(value.shape), value.dtype, value.stride()) if isinstance(value, Tensor) else value


def call_of(op: torch._ops.OpOverload, *args: Any, outputs: Any = (), **kwargs: Any) -> Call:
    named = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    results = [layouts(t) for t in tree_iter(outputs) if isinstance(t, Tensor)]
    return Call(op, tuple((name, layouts(value)) for name, value in named.items()), tuple(results))


class Recorder(TorchDispatchMode):
    """Keeps every call that touches memory, so neither views nor allocations.

    Convolutions return channels-last tensors, as cuDNN does for channels-last ones; PyTorch's meta kernels do not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.convolution_backward.default:
            return self.convolution_backward(*args)
        result = func(*args, **kwargs)
        if func is aten.convolution.default:
            result = torch.empty_like(result, memory_format=torch.channels_last)
        if not func.is_view and "empty" not in func._schema.name and func is not aten.detach.default:
            self.calls.append(call_of(func, *args, outputs=result, **kwargs))
        return result

    def convolution_backward(self, dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> list[Tensor | None]:
        """Keeps a call for each gradient, as libraries do, each without the tensor it does not read."""
        *rest, mask = rest  # type: ignore[assignment]
        results: list[Tensor | None] = [None, None, dy.sum((0, 2, 3)) if mask[2] else None]
        for i, (like, inputs) in enumerate(((x, (None, weight)), (weight, (x, None)))):
            if mask[i]:
                results[i] = torch.empty_like(like)
                alone = [i == 0, i == 1, False]
                self.calls.append(
                    call_of(aten.convolution_backward.default, dy, *inputs, *rest, alone, outputs=results[i])
                )
        return results


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Yields the list of the calls made inside. Ops run as on a GPU, with kernels and not with references."""
    recorder = Recorder()
    with mock.patch.dict(os.environ, NVCNN_KERNELS="triton"), recorder:
        yield recorder.calls


def meta_step(
    network: nn.Module,
    image_size: int,
    batch: int,
    dtype: torch.dtype,
    *,
    conv: str = "torch",
    accumulate: int = 1,
    bfloat16_transport: bool = True,
) -> Step:
    """Returns the trainer's step of a network on the meta device, on one rank, with LARC and a dynamic loss scale."""
    transport = Transport(Launch())
    transport.bfloat16 = bfloat16_transport
    choose_algorithms(network, conv, (batch, image_size), dtype, META, transport)
    return Step(
        network,
        image_size=image_size,
        device=META,
        schedule=torch.ones(50),
        transport=transport,
        dtype=dtype,
        loss_scale="dynamic",
        accumulate=accumulate,
        larc_eta=1e-3,
    )


def calls_of(step: Step, batch: int, mixed: bool = False) -> list[Call]:
    """Returns all calls of one training step, from uint8 images to new weights. mixed: the batch is."""
    empty, size = partial(torch.empty, device=META), step.image_size
    data = Batch(
        empty((batch, size, size, 3), dtype=torch.uint8),
        empty(batch, dtype=torch.int64),
        empty(batch, dtype=torch.bool),
    )
    with recorded() as calls:
        step(*[MixedBatch(*data, empty(6)) if mixed else data] * step.accumulate)
    return calls


@dataclass(frozen=True)
class GPU:
    name: str
    bandwidth: float  # bytes a second, read and written
    rate: float  # FLOPs a second of fp16 or bf16 matrix products, without sparsity


GPUS = (
    # These are peaks that nothing reaches, from NVIDIA's data sheets of the A100 80 GB SXM and the HGX B200 (a GPU of
    # eight).
    GPU("A100 (data sheet)", 2.039e12, 312e12),
    GPU("B200 (data sheet)", 8.0e12, 2250e12),
    # These were measured with a copy and a product of random 8192 x 8192 matrices.
    GPU("H100", 3.0e12, 790e12),
    GPU("H200", 4.3e12, 790e12),
)

# How often an argument moves. One that is not listed is read once, and if the schema says that it is mutated, written
# once, too.
MOVES: dict[str, dict[str, int]] = {
    "aten::copy_": {"self": 1},  # written only
    "aten::native_batch_norm": {"input": 2},  # read for the statistics and for y
    "aten::native_batch_norm_backward": {"grad_out": 2, "input": 2},  # read for the sums and for dx
    "aten::max_pool2d_with_indices_backward": {"self": 0},  # the indices say it all
    # Read for the sums and for dx. Where g, the gradient behind the mask, is asked for, the first pass writes it, and
    # the second reads it.
    "nvcnn::batch_norm_backward": {"dy": 2, "x": 2},
    "nvcnn::batch_norm_into": {"y": 1},
    "nvcnn::convolution": {"out": 1},
    "nvcnn::convolution_gradients": {"out": 1},  # written only; sums over parts stay in the L2 cache
    "nvcnn::convolution_weight_gradient": {"out": 1},  # likewise
    "nvcnn::max_pool_into": {"y": 1},
    "nvcnn::gradient_statistics": {"square_sums": 1},
    "nvcnn::larc_update": {"model_weight": 1, "weight_square_sums": 1},
    "nvcnn::refresh": {"model_weight": 1, "weight_square_sums": 1},
}


# These arguments have the shape of the convolution's output ("" is the result itself, or out) and that of its weight.
CONVOLUTIONS = {
    "nvcnn::convolution": ("", "weight"),
    "nvcnn::convolution_data_gradient": ("g", "weight"),
    "nvcnn::convolution_weight_gradient": ("g", "out"),
}


def moved(call: Call) -> Iterator[tuple[Layout, int]]:
    """Yields each tensor that the call must move to or from memory, and how often: as MOVES has it, a result once."""
    moves = MOVES.get(call.name, {})
    if call.name == "nvcnn::max_pool" and call["kernel_size"] == 1:
        moves = {"x": 0}
        yield call.outputs[0], 1  # what is read of x, every stride-th pixel
    for argument in call.op._schema.arguments:
        default = 2 if argument.alias_info is not None and argument.alias_info.is_write else 1
        for value in tree_leaves(call[argument.name], is_leaf=lambda value: isinstance(value, Layout)):
            if isinstance(value, Layout):
                yield value, moves.get(argument.name, default)
    if not any(result.alias_info for result in call.op._schema.returns):  # else they are arguments
        yield from ((result, 1) for result in call.outputs)


def bytes_of(call: Call) -> int:
    return sum(times * tensor.bytes for tensor, times in moved(call))


def flops_of(call: Call) -> int:
    """Returns the FLOPs of a convolution or matrix product, and 0 for anything else."""
    if call.name in CONVOLUTIONS:
        y, weight = CONVOLUTIONS[call.name]
        shape = (call[y or "out"] or call.outputs[0]).shape
        flops = 2 * prod(shape) * prod(call[weight].shape[1:])
        second = call["a"]  # factor of a product, in the data gradient
        return flops if second is None else flops + 2 * prod(shape) // shape[1] * second.shape[1] ** 2
    if call.name == "nvcnn::convolution_gradients":
        return 4 * prod(call["g"].shape) * call["weight"].shape[1]
    if call.name == "nvcnn::gram_matrix":  # symmetric: half of it is computed
        n, c, h, w = call["x"].shape
        return n * cdiv(h, call["stride"][0]) * cdiv(w, call["stride"][1]) * c * (c + 1)
    formula = flop_registry.get(call.op.overloadpacket)
    if formula is None:
        return 0
    shapes = [value.shape if isinstance(value, Layout) else value for _, value in call.arguments]
    out = call.outputs[0].shape
    return formula(*shapes, out_val=[out, out] if "backward" in call.name else out)


def floor(call: Call, gpu: GPU) -> float:
    """Returns the seconds that the call takes at least."""
    return max(bytes_of(call) / gpu.bandwidth, flops_of(call) / gpu.rate)
