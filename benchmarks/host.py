"""Measures the host's time of a training step: how long Python takes to launch it on a GPU that takes no time.

python -m benchmarks.host [--model resnet50] [--conv triton ...] [--steps 20] [--profile]
                          [--json FILE]

The step is the trainer's own, on tensors without memory. Launchers run as ever, and Triton binds their arguments and
looks the kernel up; nothing is compiled, and a launch does nothing. PyTorch's own operators do what they do for tensors
without memory, which stands for their launches. The driver's time is left out: some 2 to 5 us a launch. A step that is
replayed as a CUDA graph takes none of this. --profile prints where the time goes, by function.
"""

import argparse
import cProfile
import os
import pstats
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import quantiles
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks import report, timing
from benchmarks.trace import Chip, meta_step
from kernels import configurations, operators
from nvcnn.data.batch import Batch
from nvcnn.models import MODELS
from nvcnn.roofline import META
from nvcnn.step import Step

BATCH = 256  # the host takes as long for any size
OWN = ("triton", "triton-materialized", "triton-gram")  # without memory PyTorch's convolutions lose channels-last


class NoKernel:
    """Stands in for a compiled kernel, and counts its launches."""

    function = packed_metadata = None
    launches = 0

    def launch_metadata(self, *_: Any) -> Any:
        return None

    def run(self, *_: Any) -> None:
        NoKernel.launches += 1

    def __getitem__(self, grid: Any) -> Any:
        """Returns a runner that does what Triton's own does for a launch."""

        def runner(*args: Any) -> None:
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            metadata = self.launch_metadata(grid, stream, *args)
            hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
            self.run(*grid, stream, self.function, self.packed_metadata, metadata, *hooks, *args)

        return runner


def compiled(self: JITFunction, key: Any, signature: Any, device: int, *_: Any) -> NoKernel:
    """Stands in for the compiler. Returns a kernel that does nothing."""
    kernel = self.device_caches[device][0][key] = NoKernel()
    return kernel


def untraced(x: Tensor) -> bool:
    """Stands in for `operators.traced`: tensors without memory reach the launchers, as a GPU's do."""
    return False


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Stands in for torch.empty_like, which goes through Python for tensors without memory, and only for these."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=x.device)


@contextmanager
def idle_gpu(chip: int = 90) -> Iterator[None]:
    """Sends launches on tensors without memory to a driver that does nothing, within its context."""
    with (
        mock.patch.object(driver, "_active", Chip(chip)),
        mock.patch.object(JITFunction, "_do_compile", compiled),
        mock.patch.object(operators, "traced", untraced),
        mock.patch.object(configurations, "say_once", id),
        mock.patch("torch.empty_like", empty_like),
        mock.patch.dict(os.environ, NVCNN_KERNELS="triton"),
    ):
        yield


def batch_for(step: Step) -> Batch:
    with META:
        pixels = torch.empty(BATCH, step.image_size, step.image_size, 3, dtype=torch.uint8)
        return Batch(pixels, torch.empty(BATCH, dtype=torch.int64), torch.empty(BATCH, dtype=torch.bool))


def measure(step: Step, steps: int) -> tuple[list[float], int]:
    """Returns the milliseconds of CPU time of each of the steps, after three others, and the launches of a step."""
    data, times = batch_for(step), []
    with idle_gpu():
        for _ in range(3):
            step(data)
        NoKernel.launches = 0
        for _ in range(steps):
            start = time.process_time()
            step(data)
            times.append((time.process_time() - start) * 1e3)
    return times, NoKernel.launches // steps


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--conv", choices=OWN, nargs="+", default=OWN)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="the functions that take the most, of each")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for conv in asked.conv:
        step = meta_step(asked.model, BATCH, torch.float16, conv=conv)
        times, launches = measure(step, asked.steps)
        low, middle, high = map(timing.significant, quantiles(times))
        row = timing.missing(f"{asked.model}, --conv={conv}: the host's time of a step", "ms", f"{launches} launches")
        rows.append(row | {"ours": middle, "spread": f"{low} - {high}"})
        if asked.profile:
            profile = cProfile.Profile()
            with idle_gpu():
                profile.runcall(step, batch_for(step))
            pstats.Stats(profile).sort_stats("tottime").print_stats(40)
    if asked.json:
        report.write(asked.json, "host", rows)
    print(report.table(timing.shown(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
