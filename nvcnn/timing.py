"""How long a step takes on a device: contenders take turns, so that all of them see the same machine.

On a GPU a step is timed as a CUDA graph, since a short one would be timed by how fast the host launches it, and over
several sets of tensors in turn, since one set would stay in the cache.
"""

import time
from collections.abc import Callable
from math import ceil

import torch

from nvcnn.cuda_graph import record

Step = Callable[[], object]
CACHE = 256 << 20  # bytes: twice the largest L2 cache there is (B200)


def milliseconds(step: Step, device: torch.device) -> float:
    """Returns the time of one call: the device's, between two events, on a GPU; wall-clock time on the CPU."""
    if device.type == "cpu":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def repeated(step: Step, times: int) -> Step:
    """Returns a step that is `times` steps."""

    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def sets(size: int, device: torch.device) -> int:
    """Returns how many sets of `size` bytes exceed a GPU's cache when they take turns; 1 on a CPU."""
    return ceil(CACHE / size) if device.type == "cuda" else 1


def captured(step: Step, device: torch.device) -> Step:
    """Returns `step` as a CUDA graph, so that the device is timed and not the host; on the CPU `step` itself.

    Backward passes may be in it, if nothing is alive of one that ran on another stream. Its memory, and what `step`
    holds, are kept until what is returned is dropped.
    """
    return step if device.type == "cpu" else record([step], 1)[0]


def alternate(
    steps: dict[str, Step], device: torch.device, *, rounds: int, repeat: int = 1, warm_up: int = 1
) -> dict[str, list[float]]:
    """Returns milliseconds per step of each contender in each round, which runs every contender `repeat` times."""
    for step in steps.values():
        repeated(step, warm_up)()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(milliseconds(repeated(step, repeat), device) / repeat)
    return times


def load(steps: dict[str, Step], device: torch.device, seconds: float) -> None:
    """Runs the contenders in turns for so long: a GPU that has been idle is not yet at the clock it will keep."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for step in steps.values():
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
