"""How benchmarks measure: contenders take turns, so that all of them see the same machine; ratios are of one round."""

import time
from collections.abc import Callable
from math import ceil
from statistics import median, quantiles
from typing import Any

import torch

Step = Callable[[], object]
CACHE = 256 << 20  # bytes: twice the largest L2 cache there is (B200)


def milliseconds(step: Step, device: torch.device) -> float:
    """The time of one call: the device's, between two events, on a GPU; wall-clock time on the CPU."""
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
    def steps() -> None:
        for _ in range(times):
            step()

    return steps


def sets(size: int, device: torch.device) -> int:
    """How many sets of tensors of `size` bytes exceed a GPU's cache when they take turns; 1 on a CPU."""
    return ceil(CACHE / size) if device.type == "cuda" else 1


def captured(step: Step, device: torch.device) -> Step:
    """`step` as a CUDA graph: what is timed is the device, not how fast the host launches. On the CPU, `step`."""
    if device.type == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles the kernels
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def alternate(
    steps: dict[str, Step], device: torch.device, *, rounds: int, repeat: int = 1, warm_up: int = 1
) -> dict[str, list[float]]:
    """Milliseconds per step of each contender in each round; a round runs every contender `repeat` times."""
    for step in steps.values():
        repeated(step, warm_up)()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(milliseconds(repeated(step, repeat), device) / repeat)
    return times


def row(
    name: str, unit: str, ours: list[float], peer: list[float], *, images: float = 0, note: str = ""
) -> dict[str, Any]:
    """A row of the report from milliseconds of the same rounds, as ms, us, images/s or MB/s (of steps of `images`).

    Medians; `ratio` says how many times faster ours is, `spread` its quartiles over the rounds.
    """
    factor: Callable[[float], float] = {
        "ms": lambda ms: ms,
        "us": lambda ms: ms * 1e3,
        "images/s": lambda ms: images / ms * 1e3,
        "MB/s": lambda ms: images / ms * 1e3,
    }[unit]
    ratios = [p / o for o, p in zip(ours, peer, strict=True)]
    low, _, high = quantiles(ratios) if len(ratios) > 1 else ratios * 3
    return {
        "name": name,
        "ours": significant(factor(median(ours))),
        "peer": significant(factor(median(peer))),
        "unit": unit,
        "ratio": significant(median(ratios)),
        "spread": f"{significant(low)} - {significant(high)}",
        "note": note,
    }


def missing(name: str, unit: str, why: BaseException | str) -> dict[str, Any]:
    """The row of a peer that cannot be measured."""
    note = reason(why) if isinstance(why, BaseException) else why[:200]
    return {"name": name, "ours": None, "peer": None, "unit": unit, "ratio": None, "spread": "", "note": note}


def reason(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def lost(error: BaseException) -> bool:
    """Whether the GPU answers this process no more, so that whatever follows would fail, too."""
    words = "illegal", "unspecified launch failure", "misaligned address", "device-side assert"
    return any(word in str(error) for word in words)


def significant(value: float) -> float:
    """Four digits: no measurement here has more."""
    return float(f"{value:.4g}")


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For a table: nothing measured is a dash."""
    return [{key: "-" if value is None else value for key, value in row.items()} for row in rows]
