"""Times the training loop on the CPU against a bare PyTorch loop of the same model on the same batches.

python -m benchmarks.train_cpu [--data_dir DIR] [--steps N] [--json FILE]

Ours is the whole loop of nvcnn/train.py (gradients into the arena, skip on overflow, table lines, signals); the bare
one has plain modules, SGD and nothing else. They take turns of N steps in one process, on synthetic data and, with
--data_dir, on the batches of our reader. bf16 is `torch.autocast` in the bare loop.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import nn

import benchmarks.peers  # noqa: F401 (makes torchvision importable)
from benchmarks import report, timing
from benchmarks.step import plain_loop
from nvcnn.data.batch import Batch, prepare_input
from nvcnn.data.dataset import find_dataset
from nvcnn.distributed import connect
from nvcnn.settings import Settings
from nvcnn.train import Data, Run


def lenet(num_classes: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 7 * 7, 512), nn.ReLU(inplace=True), nn.Linear(512, num_classes)),
    )


def resnet18(num_classes: int) -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=num_classes)


BARE: dict[str, Callable[[int], nn.Module]] = {"lenet": lenet, "resnet18": resnet18}
CASES = [("lenet", 64, 1), ("resnet18", 8, 20)]  # model, batch, divisor of --steps in a turn: a step takes 20 x as long


class Turns:
    """Feeds our loop its data. After every `steps` batches it lets `other` have as many, and times both.

    So our loop runs as it is, from beginning to end.
    """

    def __init__(self, source: Data, other: Callable[[Batch], object], steps: int):
        self.source, self.other, self.steps = source, other, steps
        self.taken = 0
        self.ours: list[float] = []  # milliseconds a step, one value per turn
        self.theirs: list[float] = []
        self.mark = time.perf_counter()

    def __next__(self) -> Batch:
        if self.taken == self.steps:
            self.ours.append(self.lap())
            for _ in range(self.steps):
                self.other(next(self.source))
            self.theirs.append(self.lap())
            self.taken = 0
        self.taken += 1
        return next(self.source)

    def lap(self) -> float:
        before, self.mark = self.mark, time.perf_counter()
        return (self.mark - before) * 1e3 / self.steps

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def close(self) -> None:
        self.source.close()


def compare(model: str, batch: int, *, bf16: bool, data_dir: str | None, steps: int, turns: int) -> dict[str, Any]:
    """Returns one row. The first turn of each warms up and is not counted."""
    settings = Settings(
        model=model,
        data_dir=data_dir,
        batch_size=batch,
        bf16=bf16,
        num_batches=(turns + 1) * steps + 1,
        display_every=steps,
        learning_rate=1e-3,
    )
    dataset = data_dir and find_dataset(data_dir, num_classes=None, label_base=None, split="train")
    run = Run(settings, dataset or None, connect(settings.transport), None)
    bare = plain_loop(BARE[model](run.plan.num_classes), device=run.device, dtype=run.plan.dtype)

    def bare_step(batch: Batch) -> None:
        images = prepare_input(batch.images, batch.flip, dtype=torch.float32, normalize="signed")
        bare(images, batch.labels)

    run.data = turned = Turns(run.data, bare_step, steps)  # type: ignore[assignment]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        run.loop()
    dtype, data = "bf16" if bf16 else "fp32", "records" if data_dir else "synthetic"
    name = f"training loop, {model}, batch {batch}, {dtype}, {data}: nvcnn / bare PyTorch"
    return timing.row(name, "images/s", turned.ours[1:], turned.theirs[1:], images=batch)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_cpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data_dir", help="a directory made by launch/prepare.py")
    parser.add_argument("--steps", type=int, default=20, help="steps of a turn of LeNet; ResNet-18 does 1 in 20 (20)")
    parser.add_argument("--turns", type=int, default=11, help="turns of each (11)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    rows = [
        compare(model, batch, bf16=bf16, data_dir=data_dir, steps=-(-arguments.steps // share), turns=arguments.turns)
        for model, batch, share in CASES
        for bf16 in (False, True)
        for data_dir in (None, *([arguments.data_dir] if arguments.data_dir else []))
    ]
    if arguments.json:
        report.write(arguments.json, "train_cpu", rows)
    print(report.table(timing.shown(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
