"""Times the whole optimizer step on ResNet-50's 25.6 million parameters against what one would otherwise call.

python -m benchmarks.bench_larc_update [--json FILE] [--seconds N]    or    pytest benchmarks/ --benchmark-only

The peers work on fp32 gradients, as automatic mixed precision leaves them; on a GPU ours works on fp16 ones as
well. `larc_loop` applies LARC tensor by tensor as apex did, then SGD. SGD alone has no LARC. Each contender has 300 MB
of its own, more than a cache holds, so that nothing has to be flushed between steps.
"""

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

import benchmarks.peers  # noqa: F401 (makes torchvision importable)
from benchmarks import report
from nvcnn.models import build_model
from nvcnn.optimizer.arena import Arena
from nvcnn.optimizer.larc import MOMENTUM, WEIGHT_DECAY, Larc

ETA, LEARNING_RATE = 1e-3, 1e-4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Step = Callable[[], object]


def ours(mode: str, dtype: torch.dtype = torch.float32) -> Step:
    model = build_model("resnet50", num_classes=1000, seed=0)
    names = [name for name, _ in model.named_parameters()]
    arena = Arena(model, reversed(names), device=DEVICE, dtype=dtype)
    for slot in arena.slots:
        arena.gradient(slot).normal_(std=1e-3)
    return Larc(arena, schedule=torch.tensor([LEARNING_RATE]), mode=mode, eta=ETA).step


def parameters() -> list[nn.Parameter]:
    from torchvision.models import resnet50

    model = resnet50().to(DEVICE, memory_format=torch.channels_last)
    for p in model.parameters():
        p.grad = torch.empty_like(p).normal_(std=1e-3)
    return list(model.parameters())


NESTEROV: dict[str, Any] = {"lr": LEARNING_RATE, "momentum": MOMENTUM, "nesterov": True}


def sgd(**which: bool) -> Step:
    return torch.optim.SGD(parameters(), weight_decay=WEIGHT_DECAY, **NESTEROV, **which).step


def timm_lars() -> Step:
    from timm.optim import Lars

    return Lars(parameters(), weight_decay=WEIGHT_DECAY, trust_coeff=ETA, trust_clip=True, **NESTEROV).step


def larc_loop() -> Step:
    tensors = parameters()
    optimizer = torch.optim.SGD(tensors, foreach=True, **NESTEROV)

    @torch.no_grad()
    def step() -> None:
        for p in tensors:
            assert p.grad is not None
            weight_norm, gradient_norm = p.norm(), p.grad.norm()
            if weight_norm != 0 and gradient_norm != 0:
                ratio = ETA * weight_norm / (gradient_norm + WEIGHT_DECAY * weight_norm + 1e-8)
                p.grad.add_(p, alpha=WEIGHT_DECAY).mul_((ratio / LEARNING_RATE).clamp(max=1))
        optimizer.step()

    return step


OURS: dict[str, Callable[[], Step]] = {"nvcnn clip": lambda: ours("clip")}
if DEVICE.type == "cuda":
    OURS["nvcnn clip, fp16"] = lambda: ours("clip", torch.float16)
PEERS: dict[str, Callable[[], Step]] = {
    "larc_loop": larc_loop,
    "timm Lars": timm_lars,
    "SGD foreach": lambda: sgd(foreach=True),
    "SGD fused": lambda: sgd(fused=True),
}


def now() -> float:
    """Returns the time in seconds, after all work on the device is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.benchmark(group="optimizer step, ResNet-50", timer=now)
@pytest.mark.parametrize("name", [*OURS, *PEERS])
def test_optimizer_step(benchmark, name):
    step = (OURS | PEERS)[name]()
    on_gpu = DEVICE.type == "cuda"
    benchmark.pedantic(step, rounds=20, iterations=20 if on_gpu else 1, warmup_rounds=3)


def compare(seconds: float) -> dict[str, float]:
    """Returns each contender's milliseconds per step, the median over rounds.

    A round runs every contender in turn, so that all see the same machine.

    On a GPU the time is the device's, between two events around twenty steps.
    """
    steps = {name: make() for name, make in (OURS | PEERS).items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    end = now() + seconds
    while now() < end or len(times["SGD fused"]) < 5:
        for name, step in steps.items():
            times[name].append(time_on_gpu(step, 20) if DEVICE.type == "cuda" else time_on_cpu(step))
    return {name: median(values) for name, values in times.items()}


def time_on_cpu(step: Step) -> float:
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def time_on_gpu(step: Step, repeat: int) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(repeat):
        step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / repeat


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_larc_update", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to measure (20)")
    arguments = parser.parse_args()
    milliseconds = compare(arguments.seconds)
    rows = [
        {
            "name": f"optimizer step, ResNet-50: {our} / {peer}",
            "ours": round(milliseconds[our], 3),
            "peer": round(milliseconds[peer], 3),
            "unit": "ms",
            "ratio": round(milliseconds[peer] / milliseconds[our], 2),
        }
        for our in OURS
        for peer in PEERS
    ]
    if arguments.json:
        report.write(arguments.json, "bench_larc_update", rows)
    print(report.table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
