"""Records what a training step calls, with which shapes, without computing; and the kernel launches of an op.

The step is the trainer's own, on tensors of the meta device, which have no memory. An op's launches are those of its
own launcher, specialised by Triton itself for a GPU that need not be here.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kernels import configurations, conv_shape
from kernels.operators import hash_callees_first, operators
from nvcnn import roofline
from nvcnn.models import MODELS, build_model
from nvcnn.plan import SYNTHETIC_CLASSES
from nvcnn.roofline import META, Call, Layout, calls_of, recorded
from nvcnn.step import Step


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
    with META:
        network = build_model(model, num_classes=SYNTHETIC_CLASSES, seed=1, aux=aux)
    options: dict[str, Any] = {"conv": conv, "accumulate": accumulate, "bfloat16_transport": bfloat16_transport}
    return roofline.meta_step(network, MODELS[model].image_size, batch, dtype, **options)


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
    return calls_of(meta_step(model, batch, dtype, conv=conv), batch, mixed)


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
