"""Measures kernels before any is adopted: each answers one question, and its threshold says what follows.

Each probe is one file here. It has a kernel, for sizes that its tiles divide, or one of the project's that has not
proved itself yet; other ways to compute the same; and a verdict. All activations are fp16, (rows, channels), where rows
are pixels, one image after the other. `python -m benchmarks.probes` runs the probes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from benchmarks.timing import Step
from benchmarks.trace import Launch, launches_of
from kernels.operators import hash_callees_first
from nvcnn.roofline import META

# The most decisive come first.
NAMES = ("joint_gradient", "resident_forward")
IMAGES = 256


@dataclass(frozen=True)
class Contender:
    """Describes one way to do the work.

    Its floor follows from the `bytes` that it must move from or to memory, and the `flops` of its matrix products.
    """

    step: Step
    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Probe:
    """Describes a probe.

    check: returns the errors, by result, of the probe's kernels on a small input. Above `tolerance` they are wrong.
    contenders: returns the contenders at full size, the probe's own first.
    verdict: takes their microseconds, and how many times faster this GPU's memory is than that of the H100 for which
    the thresholds were set.
    seconds: how long the probe should take.
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
    """Returns the probe in the file of that name."""
    module = import_module(f"benchmarks.probes.{name}")
    hash_callees_first(vars(module))
    return module.PROBE


def launches(probe: Probe, chip: int = 90) -> list[Launch]:
    """Returns the distinct launches of the probe, in `check` as well, so that they can be compiled ahead of time."""
    found = launches_of(lambda: [contender.step() for contender in probe.contenders(META).values()], chip)
    return list(dict.fromkeys(found))


def processors(device: torch.device) -> int:
    """Returns the SMs of the GPU; those of a H100 for tensors without memory; few for Triton's interpreter."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 3


def small_rows(device: torch.device) -> int:
    """Returns the rows of a `check`: on a GPU several tiles for every program, few in the slow interpreter."""
    return 512 if device.type == "cpu" else 128 * 512


def normal(*shape: int, device: torch.device, std: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * std).half()


def images(rows: Tensor, size: int) -> Tensor:
    """Returns pixels, (rows, channels), as channels-last images of size x size in the same memory."""
    return rows.unflatten(0, (-1, size, size)).permute(0, 3, 1, 2)


def errors(**pairs: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Returns the relative error of each (result, reference) in the Euclidean norm."""
    return {name: ((a.double() - b.double()).norm() / b.double().norm()).item() for name, (a, b) in pairs.items()}


def divides(block: int, size: int) -> int:
    """Returns size / block. Raises ValueError if it is no whole number, since these kernels have no masks."""
    if size % block:
        raise ValueError(f"the probes' tiles of {block} must divide {size}")
    return size // block
