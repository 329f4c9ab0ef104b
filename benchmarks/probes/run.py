"""Runs the probes, the most decisive first, and says of each whether it is right, how long it takes, what follows.

python -m benchmarks.probes [NAME ...] [--json FILE] [--seconds 60] [--dry_run]

It prints one line for each probe: the largest relative error on a small input against float64, the microseconds of each
contender, the floor of the first, the threshold and the verdict. Contenders take turns, as CUDA graphs over sets of
tensors that together exceed the cache. Thresholds are for a H100, whose memory moves 3.0 TB/s; before times are judged,
they are multiplied by this GPU's copy bandwidth over that. The probes run in another process, which is replaced when a
probe ruins it or hangs. The exit code is 1 if a probe failed, was wrong or was not reached, and 2 without a GPU of
capability 9.0.
"""

import argparse
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch

from benchmarks import ops, report, timing
from benchmarks.probes import NAMES, Probe, load
from nvcnn.roofline import GPUS

COPY, MATMUL = 1 << 30, 8192
H100 = next(gpu for gpu in GPUS if gpu.name == "H100")
START = 20  # in so many seconds a process is ready for its first probe
Row = dict[str, Any]


def measure(probe: Probe, device: torch.device) -> Row:
    """Returns the probe's row: errors, microseconds and floors by contender, and the verdict."""
    found = probe.check(device)
    made = [probe.contenders(device)]
    count = timing.sets(min(contender.bytes for contender in made[0].values()), device)
    made += [probe.contenders(device) for _ in range(count - 1)]
    steps = {"copy": ops.copy(COPY, device), "matmul": ops.matmul(MATMUL, torch.float16, device)}
    steps |= {name: ops.in_turn([one[name].step for one in made]) for name in made[0]}
    steps = {name: timing.captured(step, device) for name, step in steps.items()}
    times = timing.alternate(steps, device, rounds=7, repeat=5, warm_up=3)
    us = {name: median(times[name]) / count * 1e3 for name in made[0]}
    floors = {
        name: median(ops.floor(contender.bytes, contender.flops, times, size=COPY, n=MATMUL)) * 1e3
        for name, contender in made[0].items()
    }
    bandwidth = 2 * COPY / median(times["copy"]) * 1e3
    return judged(probe, found, us, floors, bandwidth / H100.bandwidth)


def judged(probe: Probe, found: dict[str, float], us: dict[str, float], floors: dict[str, float], factor: float) -> Row:
    """Returns the row of what was measured.

    Where results are wrong, the verdict says so first, and is then only about their time.
    """
    wrong = [name for name, value in found.items() if not value <= probe.tolerance]
    verdict = probe.verdict(us, factor)
    return {
        "name": probe.name,
        "errors": found,
        "us": {name: timing.significant(value) for name, value in us.items()},
        "floor": {name: timing.significant(value) for name, value in floors.items()},
        "factor": timing.significant(factor),
        "threshold": probe.threshold,
        "verdict": f"WRONG ({', '.join(wrong)}); if mended: {verdict}" if wrong else verdict,
        "good": not wrong,
    }


def failed(name: str, why: BaseException | str) -> Row:
    """Returns the row of a probe without a result. Of an error it says what caused it first, and where."""
    trace = ""
    if isinstance(why, BaseException):
        trace = "".join(traceback.format_exception(why))
        first = why
        while first.__cause__ is not None:
            first = first.__cause__
        why = "; ".join(dict.fromkeys(timing.missing(name, "us", error)["note"] for error in (why, first)))
    row: Row = {"name": name, "errors": {}, "us": {}, "floor": {}, "factor": None, "threshold": ""}
    return row | {"verdict": f"FAILED: {why}", "good": False, "trace": trace}


def line(row: Row) -> str:
    """Returns the row as one line."""
    if not row["us"]:
        return f"{row['name']}: {row['verdict']}"
    times = ", ".join(f"{name} {value:g}" for name, value in row["us"].items())
    floor = next(iter(row["floor"].values()))
    error = max(row["errors"].values())
    return f"{row['name']}: error {error:.1e}; us: {times}; floor {floor:g}; {row['threshold']}: {row['verdict']}"


def serve(names: list[str], answers: Connection) -> None:
    """Sends the row of each probe, and whether the process can go on. Returns early if it cannot."""
    for name in names:
        alive = True
        try:
            row = measure(load(name), torch.device("cuda"))
        except Exception as error:  # whatever a probe raises is its result
            row = failed(name, error)
        try:
            torch.cuda.empty_cache()
            torch.cuda.synchronize()
        except (AssertionError, RuntimeError):  # the first if PyTorch was built without CUDA
            alive = False
        answers.send((row, alive))
        if not alive:
            return


def run(
    names: list[str],
    seconds: float,
    add: Callable[[Row], None],
    target: Callable[[list[str], Connection], None] = serve,
) -> None:
    """Calls `add` with a row for each probe in order, and takes no more than so many seconds.

    Another process runs `target`, which does what `serve` does.
    """
    context = multiprocessing.get_context("spawn")
    end, left = time.monotonic() + seconds, list(names)
    while left and time.monotonic() < end:
        answers, theirs = context.Pipe(duplex=False)
        process = context.Process(target=target, args=(left, theirs), daemon=True)
        process.start()
        theirs.close()
        alive, patience = True, START
        while left and alive:
            limit = min(patience + 3 * load(left[0]).seconds, end - time.monotonic())
            try:
                if answers.poll(max(0, limit)):
                    row, alive = answers.recv()
                else:
                    row, alive = failed(left[0], f"no result in {limit:.0f} s: it hangs, or --seconds are over"), False
            except EOFError:
                row, alive = failed(left[0], "its process died"), False
            del left[0]
            add(row)
            patience = 0
        process.kill()
        process.join(10)  # the driver has to end a kernel that never ends
    for name in left:
        add(failed(name, f"not reached in --seconds={seconds:g}"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well, as they come")
    parser.add_argument("--seconds", type=float, default=60, help="stop after so many (60)")
    parser.add_argument("--dry_run", action="store_true", help="list the probes; needs no GPU")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.names) - set(NAMES):
        parser.error(f"no probe is called {', '.join(sorted(unknown))}: they are {', '.join(NAMES)}")
    names = [name for name in NAMES if name in (asked.names or NAMES)]
    if asked.dry_run:
        probes = [load(name) for name in names]
        print(
            report.table(
                [{key: getattr(p, key) for key in ("name", "seconds", "threshold", "question")} for p in probes]
            )
        )
        print(f"{sum(probe.seconds for probe in probes):g} s expected beside {START} to start at most")
        return 0
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("benchmarks.probes: they are for a H100 or H200, and none is here; --dry_run lists them", file=sys.stderr)
        return 2
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(line(row), flush=True)
        if asked.json:
            report.write(asked.json, "probes", rows)

    run(names, asked.seconds, add)
    return 0 if all(row["good"] for row in rows) else 1
