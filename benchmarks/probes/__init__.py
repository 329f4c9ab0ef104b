"""Kernels that are measured before any is adopted: each answers one question, and its threshold says what follows.

A probe is one file here: a kernel for sizes that its tiles divide, what else computes the same, and a verdict. All
activations are fp16, (rows, channels), where rows are pixels, one image after the other. `python -m benchmarks.probes`
runs them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from benchmarks.timing import Step
from benchmarks.trace import META, Launch, launches_of
from kernels.operators import hash_callees_first

# The most decisive first.
NAMES = (
    "joint_gradient",
    "resident_forward",
    "l2_rate",
    "cudnn_3x3",
    "gradient_tiles",
    "stored_gradient",
    "join",
    "linear_batch_norm",
)
IMAGES = 256


@dataclass(frozen=True)
class Contender:
    """One way to do the work; `bytes` it must move from or to memory and `flops` of matrix products give its floor."""

    step: Step
    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Probe:
    """`check` returns the errors, by result, of the probe's kernels on a small input; above `tolerance` they are wrong.

    `contenders` makes those of the full size, the probe's own first. `verdict` takes their microseconds, and how many
    times faster this GPU's memory is than that of the H100 for which the thresholds were set. `seconds` are expected.
    """

    name: str
    question: str
    threshold: str
    seconds: float
    tolerance: float
    check: Callable[[torch.device], dict[str, float]]
    contenders: Callable[[torch.device], dict[str, Contender]]
    verdict: Callable[[dict[str, float], float], str]


def load(name: str) -> Probe:
    """The probe of the file of that name."""
    module = import_module(f"benchmarks.probes.{name}")
    hash_callees_first(vars(module))
    return module.PROBE


def launches(probe: Probe, chip: int = 90) -> list[Launch]:
    """The distinct kernels that the probe launches, in `check` as well, so that they can be compiled ahead of time."""
    found = launches_of(lambda: [contender.step() for contender in probe.contenders(META).values()], chip)
    return list(dict.fromkeys(found))


def processors(device: torch.device) -> int:
    """The SMs of the GPU; those of a H100 for tensors without memory; few for Triton's interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 3


def small_rows(device: torch.device) -> int:
    """Rows of a `check`: on a GPU several tiles for every program; in the interpreter, which takes its time, few."""
    return 512 if device.type == "cpu" else 128 * 512


def normal(*shape: int, device: torch.device, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * std).half()


def images(rows: Tensor, size: int) -> Tensor:
    """Pixels, (rows, channels), as channels-last images of size x size, the same memory."""
    return rows.unflatten(0, (-1, size, size)).permute(0, 3, 1, 2)


def errors(**pairs: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The relative error of each (result, reference) in the Euclidean norm."""
    return {name: ((a.double() - b.double()).norm() / b.double().norm()).item() for name, (a, b) in pairs.items()}


def divides(block: int, size: int) -> int:
    """size / block. ValueError if that is no whole number: these kernels have no masks."""
    if size % block:
        raise ValueError(f"the probes' tiles of {block} must divide {size}")
    return size // block
