"""The host's time of a training step: how long Python takes to launch it, on a GPU that takes no time.

python -m benchmarks.host [--model resnet50] [--conv triton|cudnn|torch] [--steps 10] [--profile] [--json FILE]

The step is the trainer's own, on tensors without memory. Launchers run as ever, and Triton binds their arguments and
looks the kernel up; nothing is compiled, and a launch does nothing. PyTorch's own operators do what they do for tensors
without memory, which stands for their launches. What it leaves out is the driver: 2 to 5 us a launch.
"""

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.trace import META, Chip, meta_step
from kernels import configurations, operators
from nvcnn.data import Batch
from nvcnn.models import MODELS
from nvcnn.models.conv_bn import ALGORITHMS


class NoKernel:
    """Stands in for a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        launched[0] += 1


launched = [0]


def empty_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Stands in for torch.empty_like, which goes through Python for tensors without memory, and only for these."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=x.device)


@contextmanager
def idle_gpu(chip: int = 90) -> Iterator[None]:
    """Launches on tensors without memory reach a driver that does nothing."""

    def compiled(self: JITFunction, key: Any, signature: Any, device: int, *_: Any) -> NoKernel:
        kernel = NoKernel()
        self.device_caches[device][0][key] = kernel
        return kernel

    with (
        mock.patch.object(driver, "_active", Chip(chip)),
        mock.patch.object(JITFunction, "_do_compile", compiled),
        mock.patch.object(operators, "traced", lambda x: False),
        mock.patch("torch.empty_like", empty_like),
        mock.patch.object(configurations, "say_once", lambda line: None),
        mock.patch.dict("os.environ", NVCNN_KERNELS="triton"),
    ):
        yield


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--conv", choices=ALGORITHMS, default="triton")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the row there as well")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    size, batch = MODELS[asked.model].image_size, 256
    empty = partial(torch.empty, device=META)
    data = Batch(
        empty((batch, size, size, 3), dtype=torch.uint8),
        empty(batch, dtype=torch.int64),
        empty(batch, dtype=torch.bool),
    )
    step = meta_step(asked.model, batch, torch.float16, conv=asked.conv)
    with idle_gpu():
        for _ in range(3):
            step(data)
        launched[0] = 0
        step(data)
        count = launched[0]
        times = []
        for _ in range(asked.steps):
            start = time.process_time()
            step(data)
            times.append((time.process_time() - start) * 1e3)
        print(count, min(times), median(times))
        if asked.profile:
            profile = cProfile.Profile()
            profile.runcall(lambda: [step(data) for _ in range(3)])
            pstats.Stats(profile).sort_stats("tottime").print_stats(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
