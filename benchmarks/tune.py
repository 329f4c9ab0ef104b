"""Measures launch configurations on this GPU and writes them to its table, kernels/configs/GPU.json.

python3 -m benchmarks.tune [--model resnet50] [--batch 256] [--dtype fp16|bf16] [--conv CONV] [--minutes 25] [--keys N]
                           [--dry_run] [NAME ...]                                                      (`make tune`)

For every call of the model's step, with every --conv that a run may mix, it climbs from the configuration in use to the
best neighbour until none is faster by MARGIN. A neighbour has one number doubled or halved, TMA on or off, or as many
programs as run at once in place of one for each tile; what does not compile, spills registers or changes the result is
none. Neighbours are compiled ahead, in parallel processes, except those in Triton's cache (`benchmarks.pack`). The
table keeps what it has of other ops and keys, and is written after each call, so that what is measured stays when time
runs out; heavy calls come first. With NAME, only ops whose name contains one are tuned, with --conv only its calls.

Before that, the kernel of both gradients is proved on a Hopper, in a process of its own, as it could hang
(`benchmarks.prove`). Only if it is right, the table has a configuration of it, and --conv=auto a candidate more.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import pack, prove, timing
from benchmarks.ops import CONVS, layer_calls
from benchmarks.replay import Arguments, argument_sets, arguments, describe, difference, outcome, replay, whole
from benchmarks.trace import Launch, launches
from kernels import configurations
from kernels.configurations import SMS, Configuration
from kernels.convolution_gradients import COMPUTED, OP, SOURCE, USES, table_key
from kernels.operators import looked_up_again
from nvcnn.cuda_graph import quick_captures
from nvcnn.models import MODELS
from nvcnn.roofline import Call, bytes_of

MARGIN = 0.02  # a gain below it is noise
SECONDS = 0.4  # it takes to check and time a compiled candidate
PATIENCE = 60.0  # seconds for a proof: most of them compile
TOLERANCE = 1e-3  # of the norm: it is twice a rounding to fp16, and less than one to bf16
Table = dict[str, dict[str, Configuration]]
Clock = Callable[[Call], float]
Compilable = Callable[[Call, str, str, list[Configuration]], list[Configuration]]


@contextmanager
def launched_with(table: Table) -> Iterator[None]:
    """Has ops look their configurations up in `table` within its context; what the table lacks, they compute."""
    with (
        mock.patch.object(configurations, "read_table", return_value=table),
        mock.patch.object(configurations, "say_once"),
        looked_up_again(),
    ):
        yield


def looked_up(run: Callable[[], object], table: Table) -> dict[tuple[str, str], Configuration]:
    """Returns the configurations that launchers get from the table or compute when `run` calls them, by op and key."""
    configurations.answers.clear()
    with launched_with(table):
        run()
    return dict(configurations.answers)


def neighbours(config: Configuration) -> Iterator[Configuration]:
    for name, value in config.items():
        others = [value * 2, value // 2]
        if name == "TMA":
            yield {**config, name: 1 - value}
            if not value and "BOX_H" in config:  # tiles of one pixel are far from a box
                yield {**config, name: 1, "BOX_H": 1, "BOX_W": 1}
            continue
        if name in ("BOX_H", "BOX_W") and not config["TMA"]:
            continue  # without TMA there are no boxes
        if name == "BOX_W":  # another form, with as many pixels; BOX_H alone changes the number of images
            forms = [(config["BOX_H"] // 2, value * 2), (config["BOX_H"] * 2, value // 2)]
            yield from ({**config, "BOX_H": h, "BOX_W": w} for h, w in forms if h and w)
            continue
        if name == "maxnreg":
            yield {**config, name: 255 if value < 255 else 128}
            continue
        if name == "PERSISTENT":
            yield {**config, name: 0 if value else 2 * SMS}
        for other in others:
            if other >= 1 and not (name == "num_warps" and other > 16):
                yield {**config, name: other}


def within(config: Configuration, rings: int) -> list[Configuration]:
    """Returns the configuration, and those that at most so many steps from neighbour to neighbour lead to."""
    found = {tuple(config.items()): config}
    ring = [config]
    for _ in range(rings):
        around = {tuple(c.items()): c for near in ring for c in neighbours(near)}
        ring = [c for items, c in around.items() if items not in found]
        found |= around
    return list(found.values())


def candidate(call: Call, op: str, key: str, config: Configuration, chip: int) -> list[Launch]:
    """Returns what the call starts with this configuration of one of its ops; nothing if its launcher refuses it."""
    with launched_with({op: {key: config}}):
        try:
            return launches(call, chip)
        except ValueError:
            return []


def heaviest(calls: Counter[Call], chip: int, table: Table, count: int) -> Iterator[tuple[Call, str, str]]:
    """Yields so many ops and keys of the table, of the heaviest calls, each with the first call that asks for it."""
    done: set[tuple[str, str]] = set()
    for call in sorted(calls, key=lambda call: -calls[call] * bytes_of(call)):
        for op, key in looked_up(partial(launches, call, chip), table):
            if len(done) < count and (op, key) not in done:
                done.add((op, key))
                yield call, op, key


def launched(keys: int, rings: int) -> list[Launch]:
    """Returns the launches that tuning the heaviest convolutions of ResNet-50's fp16 step tries first.

    They are those of the chip that `pack` compiles for.
    """
    every, found = layer_calls("resnet50", 256, torch.float16, *CONVS), []
    calls = Counter({call: n for call, n in every.items() if "convolution" in call.name})
    for call, op, key in heaviest(calls, pack.CHIP, {}, keys):
        start = looked_up(partial(launches, call, pack.CHIP), {})[op, key]
        for config in within(start, rings):
            found += candidate(call, op, key, config, pack.CHIP)
    return found


def compiled_ahead(
    call: Call,
    op: str,
    key: str,
    configs: list[Configuration],
    *,
    pool: ProcessPoolExecutor,
    chip: int,
    totals: pack.Outcome,
) -> list[Configuration]:
    """Returns those of the configurations that compile, without spills. The pool's processes compile them at once."""
    found = [candidate(call, op, key, config, chip) for config in configs]
    became = pack.compile_all(chain.from_iterable(found), pool, spilling=False)
    for count in ("hits", "compiled", "seconds"):
        setattr(totals, count, getattr(totals, count) + getattr(became, count))
    totals.failed |= became.failed
    return [c for c, started in zip(configs, found, strict=True) if started and not became.failed.keys() & set(started)]


def results(call: Call, device: torch.device) -> list[Tensor]:
    """Returns what the call returns and writes, always for the same arguments."""
    torch.manual_seed(0)
    return whole(outcome(call, arguments(call, device)))


def agrees(call: Call, device: torch.device, expected: list[Tensor]) -> bool:
    """Returns whether the call gives `expected`, except for the order of its sums and the roundings that follow."""
    # A NaN does not agree with anything.
    return all(difference(a, b) <= TOLERANCE for a, b in zip(results(call, device), expected, strict=True))


@lru_cache(maxsize=1)
def sets_of(call: Call, device: torch.device) -> list[Arguments]:
    return argument_sets(call, device)


def milliseconds(call: Call, device: torch.device) -> float:
    made = sets_of(call, device)
    step = timing.captured(replay(call.op, made), device)
    return median(timing.milliseconds(timing.repeated(step, 3), device) / (3 * len(made)) for _ in range(7))


def climb(
    call: Call,
    op: str,
    key: str,
    start: Configuration,
    device: torch.device,
    table: Table,
    clock: Clock,
    *,
    compilable: Compilable = lambda call, op, key, configs: configs,
    end: float = float("inf"),
) -> tuple[Configuration, float, float]:
    """Returns the best configuration found for the call until `end`, its time and that of `start`.

    Times are in the clock's unit. `compilable` says which configurations compile, and compiles them, many at a time.
    """
    with launched_with(table):
        expected = results(call, device)

    def cost(config: Configuration, enough: float) -> float:
        """Returns its time; infinity if it fails, or if it takes less than `enough` but is wrong."""
        if time.monotonic() > end:
            return float("inf")
        with launched_with({**table, op: {**table.get(op, {}), key: config}}):
            try:
                taken = clock(call)
                return taken if taken >= enough or agrees(call, device, expected) else float("inf")
            except Exception as error:  # shared memory runs out, or the compiler refuses: Triton raises many classes
                if timing.lost(error):
                    raise
                return float("inf")

    first = best_cost = cost(start, float("inf"))
    best = start
    tried = {tuple(start.items())}
    while True:
        around = [c for c in neighbours(best) if tuple(c.items()) not in tried]
        tried |= {tuple(c.items()) for c in around}
        nearest, nearest_cost = best, best_cost * (1 - MARGIN)
        for config in compilable(call, op, key, around):
            if (found := cost(config, nearest_cost)) < nearest_cost:
                nearest, nearest_cost = config, found
        if nearest is best:
            return best, best_cost, first
        best, best_cost = nearest, nearest_cost


def text_of(table: Table) -> str:
    """Returns the table as JSON, with a line for each key."""
    ops = []
    for op, entries in sorted(table.items()):
        lines = [f"    {json.dumps(key)}: {json.dumps(dict(config))}" for key, config in sorted(entries.items())]
        ops.append(f"  {json.dumps(op)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(ops) + "\n}\n"


def record_passes(
    file: Path, dtype: str, *, command: Callable[..., list[str]] = prove.command, seconds: float = PATIENCE
) -> None:
    """Proves each kernel of both gradients in a process. `file` then has those that are right.

    Those of another source are dropped. It prints a line for each. command: what runs the proof, in so many seconds.
    """
    table: Table = json.loads(file.read_text()) if file.exists() else {}
    for use in USES:
        fault = prove.fault_of(command(*use, dtype), seconds)
        key = table_key(prove.DTYPES[dtype], *use)
        print(f"{OP} {key}: {fault or 'right'}", flush=True)
        entries = {other: config for other, config in table.pop(OP, {}).items() if other != key and SOURCE in other}
        entries |= {} if fault else {key: COMPUTED}
        table |= {OP: entries} if entries else {}
    if table or file.exists():
        file.write_text(text_of(table))


def tune(
    calls: Counter[Call],
    device: torch.device,
    file: Path,
    *,
    clock: Clock,
    seconds: float,
    keys: int = 1000,
    **options: Any,
) -> None:
    """Tunes so many keys, those of the heaviest calls first. It writes `file` and prints the result after each.

    `options` are those of `climb`.
    """
    table: Table = json.loads(file.read_text()) if file.exists() else {}
    end = time.monotonic() + seconds
    done: set[tuple[str, str]] = set()
    for call in sorted(calls, key=lambda call: -calls[call] * bytes_of(call)):
        for (op, key), start in looked_up(replay(call.op, [arguments(call, device)]), table).items():
            if (op, key) in done:
                continue
            if len(done) == keys:
                return
            if time.monotonic() > end:
                print(f"time is up: {op} {key} and what follows is left as it was", flush=True)
                return
            done.add((op, key))
            best, cost, first = climb(call, op, key, start, device, table, clock, end=end, **options)
            if cost == float("inf"):
                print(f"{describe(call)}: {key}: {dict(start)} has no time: not in the table", flush=True)
                continue
            table.setdefault(op, {})[key] = best
            file.write_text(text_of(table))
            print(
                f"{describe(call)}: {key}: {dict(best)}, {first / cost:.2f} times as fast as {dict(start)}", flush=True
            )


def chosen(asked: argparse.Namespace) -> Counter[Call]:
    every = layer_calls(asked.model, asked.batch, prove.DTYPES[asked.dtype], *(asked.conv or CONVS))
    return Counter({call: n for call, n in every.items() if any(name in call.name for name in asked.names or [""])})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.tune", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only ops whose name contains it")
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=("fp16", "bf16"), default="fp16")
    parser.add_argument("--conv", nargs=1, choices=CONVS, help="what a step with it launches (all)")
    parser.add_argument("--minutes", type=float, default=25.0, help="stop after so many (25)")
    parser.add_argument("--keys", type=int, default=1000, help="so many configurations, the heaviest (all)")
    parser.add_argument("--dry_run", action="store_true", help="list them, here")
    asked = parser.parse_args()
    if not torch.cuda.is_available() and not asked.dry_run:
        print("benchmarks.tune: no CUDA device here; without a table configurations are computed", file=sys.stderr)
        return 2
    if asked.dry_run:
        calls = chosen(asked)
        for call, op, key in heaviest(calls, pack.CHIP, {}, asked.keys):
            start = looked_up(partial(launches, call, pack.CHIP), {})[op, key]
            around = len(within(start, 1)) - 1
            print(f"{calls[call]} x {describe(call)}: {key}: from {dict(start)}, {around} neighbours, "
                  f"about {3 * around * SECONDS:.0f} s")  # fmt: skip
        return 0
    totals, began = pack.Outcome(), time.monotonic()
    with pack.workers(min(14, len(os.sched_getaffinity(0)))) as pool:  # the pool is made before the GPU is touched
        device = torch.device("cuda")
        major, minor = torch.cuda.get_device_capability(device)
        file = configurations.TABLES / f"{configurations.table_name(device)}.json"
        ahead = partial(compiled_ahead, pool=pool, chip=10 * major + minor, totals=totals)
        options = {"clock": partial(milliseconds, device=device), "keys": asked.keys, "compilable": ahead}
        if major == 9 and any(name in OP for name in asked.names or [""]):
            record_passes(file, asked.dtype)
        with quick_captures():
            tune(chosen(asked), device, file, seconds=60 * asked.minutes + began - time.monotonic(), **options)
    print(f"kernels: {totals}\nwritten: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
