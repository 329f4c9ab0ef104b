"""Records what a training step calls, with which shapes, without computing; and the kernel launches of an op.

The step is the trainer's own, on tensors of the meta device, which have no memory. An op's launches are those of its
own launcher, specialised by Triton itself for a GPU that need not be here.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from math import prod
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import configurations, conv_shape
from kernels.operators import hash_callees_first, operators
from nvcnn.data.batch import Batch, MixedBatch
from nvcnn.distributed import Transport
from nvcnn.kernel_choices import choose_algorithms
from nvcnn.models import MODELS, build_model
from nvcnn.plan import SYNTHETIC_CLASSES
from nvcnn.program import Launch as Launched
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
    model: str,
    batch: int,
    dtype: torch.dtype,
    *,
    conv: str = "torch",
    aux: bool = False,
    accumulate: int = 1,
    bfloat16_transport: bool = True,
) -> Step:
    """Returns the trainer's step on one rank, with LARC and a dynamic loss scale, on the meta device."""
    transport = Transport(Launched())
    transport.bfloat16 = bfloat16_transport
    size = MODELS[model].image_size
    with META:
        network = build_model(model, num_classes=SYNTHETIC_CLASSES, seed=1, aux=aux)
    choose_algorithms(network, conv, (batch, size), dtype, META, transport)
    return Step(
        network,
        image_size=size,
        device=META,
        schedule=torch.ones(50),
        transport=transport,
        dtype=dtype,
        loss_scale="dynamic",
        accumulate=accumulate,
        larc_eta=1e-3,
    )


def step_calls(
    model: str = "resnet50",
    batch: int = 256,
    dtype: torch.dtype = torch.float16,
    conv: str = "torch",
    mixed: bool = False,
) -> list[Call]:
    """Returns all calls of one training step of the model with --conv, from uint8 images to new weights.

    mixed: the batch is, as with --mixup or --cutmix.
    """
    step, size = meta_step(model, batch, dtype, conv=conv), MODELS[model].image_size
    empty = partial(torch.empty, device=META)
    data = Batch(
        empty((batch, size, size, 3), dtype=torch.uint8),
        empty(batch, dtype=torch.int64),
        empty(batch, dtype=torch.bool),
    )
    with recorded() as calls:
        step(MixedBatch(*data, empty(6)) if mixed else data)
    return calls


def evaluation_calls(
    model: str = "resnet50", batch: int = 256, dtype: torch.dtype = torch.float16, conv: str = "triton"
) -> list[Call]:
    """Returns all calls of the model with --conv on a batch of images, in evaluation."""
    step, size = meta_step(model, batch, dtype, conv=conv), MODELS[model].image_size
    images = torch.empty(batch, step.channels, size, size, device=META, dtype=dtype)
    step.model.eval()
    with torch.no_grad(), recorded() as calls:
        step.model(images.to(memory_format=torch.channels_last))
    return calls


def plain_calls(model: str = "resnet50", batch: int = 256, dtype: torch.dtype = torch.float16) -> list[Call]:
    """Returns all calls of forward, loss and backward of the model as others have it, of PyTorch's own operators."""
    from benchmarks.peers import peer

    with META:
        network = peer(model)[0].to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    size = MODELS[model].image_size
    images = torch.empty(batch, 3, size, size, device=META, dtype=dtype).to(memory_format=torch.channels_last)
    labels = torch.empty(batch, dtype=torch.int64, device=META)
    with recorded() as calls:
        F.cross_entropy(network(images).float(), labels).backward()
    return calls


@dataclass(frozen=True)
class Launch:
    """Describes a kernel as Triton compiles it.

    `specialization` is Triton's own JSON of signature, constants, alignment and options, without the path of its device
    library, which is another one on another machine.
    """

    module: str
    kernel: str
    chip: int
    specialization: str
    grid: tuple[int, ...] = field(compare=False)
    sizes: dict[str, int] = field(default_factory=dict, compare=False)  # the integers it is launched with, by name

    @property
    def name(self) -> str:
        """Returns what tells it from other launches: dtypes except fp32, sizes divisible by 16, constants, warps."""
        data = json.loads(self.specialization)
        arguments = list(data["signature"])
        constants = {
            arguments[path[0]]: v for path, v in zip(data["constant_keys"], data["constant_vals"], strict=True)
        }
        aligned = {arguments[path[0]] for path, v in zip(data["attrs_keys"], data["attrs_vals"], strict=True) if v}
        words = [f"{self.module.split('.')[-1]}.{self.kernel}"]
        for argument, kind in data["signature"].items():
            if argument in constants:
                words.append(f"{argument}={constants[argument]}")
            elif kind.startswith("tensordesc"):
                words.append(f"{argument}:tma")
            elif kind == "i64" or (kind.startswith("*") and kind != "*fp32"):
                words.append(f"{argument}:{kind.strip('*')}")
            elif kind == "i32" and argument in aligned:
                words.append(f"{argument}%16")
        return " ".join([*words, f"warps={data['options']['num_warps']}"])


class Chip:
    """Stands in for the driver of a GPU of this compute capability (90: sm_90), for everything but running."""

    def __init__(self, chip: int, *, compiles: bool = True):
        self.chip, self.compiles = chip, compiles

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.chip, 32)

    def get_current_device(self) -> int:
        # Triton caches by device. For one whose cache is empty, it asks for every kernel, and launches none.
        return self.chip if self.compiles else -self.chip

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(call: Call, chip: int, table: str = "") -> list[Launch]:
    """Returns what the op's launcher starts for the call on that chip, configured by kernels/configs/`table`.json."""
    arguments = {k: v.meta() if isinstance(v, Layout) else v for k, v in call.arguments}
    # The operator itself would be the fake one for meta tensors.
    return launches_of(partial(operators[call.name].launcher, **arguments), chip, table)


def launches_of(step: Callable[[], object], chip: int, table: str = "") -> list[Launch]:
    """Returns what `step` starts on tensors of the meta device, on that chip.

    It is configured by kernels/configs/`table`.json.
    """
    found: list[Launch] = []
    run = JITFunction.run

    def launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
            specialization = json.loads(compile["specialization_data"])
            specialization["options"].pop("extern_libs", None)
            named = dict(zip(self.arg_names, args, strict=False)) | kwargs
            sizes = {name: int(value) for name, value in named.items() if isinstance(value, int)}
            found.append(Launch(fn.module, fn.name, chip, json.dumps(specialization), tuple(grid), sizes))
            return True  # nothing to compile or to launch

        with knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = note
            run(self, *args, grid=grid, warmup=warmup, **kwargs)

    with (
        mock.patch.object(driver, "_active", Chip(chip, compiles=False)),
        mock.patch.dict(os.environ, NVCNN_KERNELS="triton"),
        mock.patch.object(JITFunction, "run", launch),
        mock.patch.object(configurations, "table_name", return_value=table),
        mock.patch.object(conv_shape, "capability", return_value=chip // 10),
        mock.patch.object(configurations, "say_once"),
    ):
        step()
    return found


def compiled(launch: Launch) -> Any:
    """Returns the launch's kernel as Triton's CompiledKernel, of which nothing is loaded."""
    module = import_module(launch.module)
    hash_callees_first(vars(module))
    with mock.patch.object(driver, "_active", Chip(launch.chip)):
        return getattr(module, launch.kernel).preload(launch.specialization)
