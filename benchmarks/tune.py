"""Measures launch configurations on this GPU and writes them to its table, kernels/configs/GPU.json.

python3 -m benchmarks.tune [--model resnet50] [--batch 256] [--minutes 25] [NAME ...]        (`make tune`)

For every call of the model's step, with --conv=torch and with --conv=triton, in fp16 and bf16: from the configuration
in use, climb to the best neighbour (one of its numbers doubled or halved, TMA on or off, as many programs as run at
once in place of one a tile) until none is faster by MARGIN; what does not compile, or changes the result, is no
neighbour. The table keeps what it has of other ops and keys, and is written after each call, so that what is measured
stays when time runs out; heavy calls come first. NAME: only ops whose name contains one.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks import timing
from benchmarks.ops import layer_calls
from benchmarks.replay import arguments, describe, replay
from benchmarks.roofline import bytes_of
from benchmarks.trace import Call
from kernels import configurations
from kernels.configurations import Configuration
from kernels.convolution_weight_gradient import SMS
from nvcnn.models import MODELS

MARGIN = 0.02  # a gain below it is noise
TOLERANCE = 1e-3  # of the norm: twice a rounding to fp16, and under one to bf16
Table = dict[str, dict[str, Configuration]]
Clock = Callable[[Call], float]


@contextmanager
def launched_with(table: Table) -> Iterator[None]:
    """Ops look their configurations up in `table`; what it lacks, they compute."""
    with (
        mock.patch.object(configurations, "read_table", return_value=table),
        mock.patch.object(configurations, "say_once"),
    ):
        yield


def looked_up(call: Call, device: torch.device, table: Table) -> dict[tuple[str, str], Configuration]:
    """What the call's launcher asks the table for, by op and key, and is answered."""
    configurations.answers.clear()
    with launched_with(table):
        call.op(**arguments(call, device))
    return dict(configurations.answers)


def neighbours(config: Configuration) -> Iterator[Configuration]:
    for name, value in config.items():
        others = [value * 2, value // 2]
        if name == "TMA":
            yield {**config, name: 1 - value}
            continue
        if name == "BOX_W" and not config["TMA"]:
            continue  # there are no boxes
        if name == "PERSISTENT":
            yield {**config, name: 0 if value else 2 * SMS}
        for other in others:
            if other >= 1 and not (name == "num_warps" and other > 16):
                yield {**config, name: other}


def results(call: Call, device: torch.device) -> list[Tensor]:
    """What the call returns and writes, always for the same arguments."""
    torch.manual_seed(0)
    made = arguments(call, device)
    returned = call.op(**made)
    # Sums are (2, parts, channels), and how many parts there are is the configuration's business.
    return [t.sum(1) if t.dim() == 3 else t for t in tree_leaves((returned, made)) if isinstance(t, Tensor)]


def agrees(call: Call, device: torch.device, expected: list[Tensor]) -> bool:
    """Whether the call gives `expected`, but for the order of its sums and the roundings that follow."""
    for ours, theirs in zip(results(call, device), expected, strict=True):
        difference = (ours.double() - theirs.double()).norm()
        if not difference <= TOLERANCE * theirs.double().norm():  # a NaN is not
            return False
    return True


def milliseconds(call: Call, device: torch.device) -> float:
    step, sets = replay(call, device)
    step = timing.captured(step, device)
    return median(timing.milliseconds(timing.repeated(step, 3), device) / (3 * sets) for _ in range(7))


def climb(call: Call, op: str, key: str, start: Configuration, device: torch.device, table: Table, clock: Clock):
    """The best configuration found for the call, its time and that of `start`, in the clock's unit."""
    with launched_with(table):
        expected = results(call, device)

    def cost(config: Configuration) -> float:
        with launched_with({**table, op: {**table.get(op, {}), key: config}}):
            try:
                return clock(call) if agrees(call, device, expected) else float("inf")
            except Exception as error:  # out of shared memory, or refused by the compiler: Triton has no one class
                if "illegal" in str(error) or "unspecified launch failure" in str(error):
                    raise  # the device is lost to this process
                return float("inf")

    first = best_cost = cost(start)
    best = start
    tried: dict[tuple, float] = {tuple(start.items()): first}
    while True:
        around = [c for c in neighbours(best) if tuple(c.items()) not in tried]
        tried |= {tuple(c.items()): cost(c) for c in around}
        nearest = min(around, key=lambda c: tried[tuple(c.items())], default=best)
        if tried[tuple(nearest.items())] > best_cost * (1 - MARGIN):
            return best, best_cost, first
        best, best_cost = nearest, tried[tuple(nearest.items())]


def text_of(table: Table) -> str:
    """The table as JSON, a line for each key."""
    ops = []
    for op, entries in sorted(table.items()):
        lines = [f"    {json.dumps(key)}: {json.dumps(dict(config))}" for key, config in sorted(entries.items())]
        ops.append(f"  {json.dumps(op)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(ops) + "\n}\n"


def tune(calls: Counter[Call], device: torch.device, file: Path, *, clock: Clock, seconds: float) -> None:
    """Tunes the calls, the heaviest first, and writes `file` after each; says each result."""
    table: Table = json.loads(file.read_text()) if file.exists() else {}
    end = time.monotonic() + seconds
    done: set[tuple[str, str]] = set()
    for call in sorted(calls, key=lambda call: -calls[call] * bytes_of(call)):
        for (op, key), start in looked_up(call, device, table).items():
            if (op, key) in done:
                continue
            if time.monotonic() > end:
                print(f"time is up: {op} {key} and what follows is left as it was", flush=True)
                return
            done.add((op, key))
            best, cost, first = climb(call, op, key, start, device, table, clock)
            table.setdefault(op, {})[key] = best
            file.write_text(text_of(table))
            print(
                f"{describe(call)}: {key}: {dict(best)}, {first / cost:.2f} times as fast as {dict(start)}", flush=True
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only ops whose name contains it")
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=25.0, help="stop after so many (25)")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.tune: no CUDA device here; without a table configurations are computed", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    calls: Counter[Call] = Counter()
    for dtype in (torch.float16, torch.bfloat16):
        calls.update(layer_calls(asked.model, asked.batch, dtype))
    chosen = Counter({call: n for call, n in calls.items() if any(name in call.name for name in asked.names or [""])})
    file = configurations.TABLES / f"{configurations.table_name(device)}.json"
    tune(chosen, device, file, clock=partial(milliseconds, device=device), seconds=60 * asked.minutes)
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
