"""Runs everything that needs a GPU, in parts of a few minutes each; `pack` prepares them where there is none.

python3 -m benchmarks.gpu pack [--out DIR] ...                  compiles ahead: see benchmarks.pack
python3 -m benchmarks.gpu [PART ...] [--out DIR] [--dry_run]    (`make gpu`)
python3 -m benchmarks.gpu summary FILE ... [--out DIR]          merges the GPU.json of several calls

The parts, which all run in this order by default, are first (200 s: right or wrong, the step, probes, each layer),
tune, tests, ops, layers, conv, step and models (250 s each). A part is a list of items, each with the seconds it should
take. An item that does not fit any more is left out, which is printed; 15 s before its limit a part ends whatever runs.
An item is one process, or several side by side, which write as they go. All of it needs PyTorch, Triton and pytest, but
no network.

After every item DIR (benchmarks/results) gets GPU.json, with machine, versions and rows, GPU.md, the same as tables,
and GPU.log; at the end of a part it gets GPU.png, which shows the share of the floor that each call reaches. The exit
code is 1 if a test fails, a kernel is wrong or an item does not end well, and 2 without a GPU.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from benchmarks import pack, report, step, timing
from benchmarks.first import FAMILIES

RESERVE = 15  # seconds before a part's limit, for what still has to be written
FOLDER = pack.FOLDER / "rows"  # the items write FOLDER/SECTION.json
MOST_LINES = 28  # a table in what is printed last has no more
LAST_LINES = 15  # of the output of an item that fails, which are printed

Command = tuple[str, ...]


@dataclass(frozen=True)
class Item:
    """Holds commands for `python -m`, which run side by side.

    In a command {folder} stands for the folder of the rows, {seconds} and {minutes} for the time that is left.
    seconds: what it should take on a H100. It begins if that is left, and is ended after twice that.
    least: where it is not 0, the item begins if so many seconds are left, and takes all that are left.
    quiet: its output goes to GPU.log alone, unless it fails.
    """

    name: str
    seconds: float
    commands: tuple[Command, ...]
    least: float = 0.0
    quiet: bool = True


@dataclass(frozen=True)
class Part:
    limit: int
    items: tuple[Item, ...]


def rows_of(section: str) -> str:
    return f"--json={{folder}}/{section}.json"


def one(name: str, seconds: float, *command: str, least: float = 0.0) -> Item:
    return Item(name, seconds, ((*command, rows_of(name)),), least)


def kernels(seconds: float, *parts: str) -> Item:
    return Item("kernels", seconds, (("benchmarks.pack", *parts),), quiet=False)


def checks(seconds: float) -> Item:
    commands = [("benchmarks.first", "checks", family, rows_of(f"checks-{family}")) for family in FAMILIES]
    return Item("checks", seconds, tuple(commands), quiet=False)


# tests/end_to_end, tests/test_install.py and the first two of these are about packages and not about the GPU. The third
# tests the compiler's output, which is the same everywhere, and takes a minute.
LEFT_OUT = ("tests/nvcnn/data", "tests/nvcnn/prepare", "tests/kernels/test_codegen.py")
TESTS = ("tests/kernels", "tests/nvcnn", *(f"--ignore={path}" for path in LEFT_OUT))
TUNE = ("benchmarks.tune", "--conv=triton-gram", "--keys=30", "--minutes={minutes}")
# Of two v one makes up for the q in pyproject.toml, so that each test has its line.
PYTEST = ("pytest", "-vv", "-p", "no:cacheprovider", *(("-n", "14") if find_spec("xdist") else ()))
PARTS = {
    "first": Part(
        200,
        (
            kernels(10, "first"),
            checks(40),
            one("step", 50, "benchmarks.first", "step"),
            one("probes", 45, "benchmarks.probes", "--seconds=37"),
            one("call-by-call", 40, "benchmarks.ops", "layers", "--seconds={seconds}", least=15),
        ),
    ),
    "tune": Part(250, (kernels(5), Item("tune", 225, (TUNE,), least=60, quiet=False))),
    "tests": Part(
        250,
        (
            kernels(5),
            Item("learning", 60, ((*PYTEST, "tests/nvcnn/test_learning.py"),)),
            Item("tests", 160, ((*PYTEST, "-m", "not full", *TESTS),), least=60),
        ),
    ),
    "ops": Part(250, (kernels(5), one("ops", 200, "benchmarks.ops", "--seconds={seconds}", least=60))),
    "layers": Part(
        250,
        (
            kernels(5),
            one("layers", 225, "benchmarks.layers", "batch_norm", "max_pool", "global_average", "cross_entropy",
                "prepare_input", "gram_matrix", least=60),
        ),
    ),
    "conv": Part(250, (kernels(5), one("conv", 225, "benchmarks.layers", "convolution", "bottleneck", least=60))),
    "step": Part(250, (kernels(5), one("whole-step", 225, "benchmarks.step", "--device=cuda", least=60))),
    "models": Part(
        250,
        (
            kernels(10, "models"),
            *(
                one(f"step-{model}", seconds, "benchmarks.step", "--device=cuda", f"--model={model}")
                for model, seconds in zip(step.OTHERS, (45, 80, 90), strict=True)
            ),
        ),
    ),
}  # fmt: skip


def available(item: Item) -> bool:
    """Returns whether the modules of its commands are there."""
    return all(find_spec(command[0]) for command in item.commands)


def run_item(item: Item, limit: float) -> list[int | None]:
    """Runs the commands side by side and returns their exit codes.

    After `limit` seconds a command is ended with its children, and its exit code is None.
    """
    words = {"folder": FOLDER, "seconds": f"{max(0, limit - RESERVE):.0f}", "minutes": f"{max(0, limit - 20) / 60:.2f}"}
    environment = os.environ | {"TRITON_CACHE_DIR": str(pack.CACHE), "PYTHONUNBUFFERED": "1"}
    processes, readers = [], []
    with (FOLDER / f"{item.name}.log").open("w") as log:

        def read(process: subprocess.Popen[str]) -> None:
            assert process.stdout
            for line in process.stdout:
                log.write(line)
                if not item.quiet:
                    print(line, end="", flush=True)

        for command in item.commands:
            arguments = [sys.executable, "-m", *(word.format(**words) for word in command)]
            process = subprocess.Popen(
                arguments,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=Path(__file__).parents[1],
                env=environment,
                start_new_session=True,  # so that it can be ended with its children
            )
            processes.append(process)
            readers.append(Thread(target=read, args=(process,)))
            readers[-1].start()
        end = time.monotonic() + limit
        codes: list[int | None] = []
        try:
            for process in processes:
                try:
                    codes.append(process.wait(max(0.0, end - time.monotonic())))
                except subprocess.TimeoutExpired:
                    codes.append(None)
        finally:
            for process in processes:
                try:
                    os.killpg(process.pid, signal.SIGKILL)  # this ends children that outlived it, too
                except ProcessLookupError:
                    continue
            for process, reader in zip(processes, readers, strict=True):
                process.wait()
                reader.join()
    return codes


def test_rows(log: str, note: str) -> list[dict[str, Any]]:
    """Returns one row from pytest's verbose output, which may be cut off.

    It says how many tests passed, how many ran, and which failed.
    """
    outcomes = r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
    results = [(name, how) for name, how in re.findall(rf"^(tests/.*?) {outcomes}\b.*\[ *\d+%\]$", log, re.MULTILINE)]
    # With several workers a line begins with the name of its worker.
    results += [
        (name, how)
        for how, name in re.findall(rf"^\[gw\d+\] \[ *\d+%\] {outcomes} (tests/\S.*?) *$", log, re.MULTILINE)
    ]
    # A file that cannot be imported has no results; the closing summary names it.
    results += [(name, "ERROR") for name in re.findall(r"^ERROR (tests/[^:\s]+)(?: - .*)?$", log, re.MULTILINE)]
    counts = Counter(outcome for _, outcome in results)
    passed, skipped = counts["PASSED"], counts["SKIPPED"]
    bad = [name for name, outcome in results if outcome in ("FAILED", "ERROR")]
    ran = len(results) - skipped
    row = timing.missing("tests passed / run", "tests", "")
    row["note"] = "; ".join(filter(None, [note, f"{skipped} skipped", *bad]))
    return [row | {"ours": passed, "peer": ran, "ratio": timing.significant(passed / ran) if ran else None}]


def what_tests_lack() -> str:
    """Returns a line with the packages missing here, whose tests are skipped, and with what is left out anyway."""
    absent = [name for name in ("google_crc32c", "nvidia.dali", "horovod", "mpi4py", "xdist") if not found(name)]
    missing = ", ".join(absent) or "none"
    return f"left out: tests/nvcnn/data, tests/nvcnn/prepare, code generation; packages missing here: {missing}"


def found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # raised where the package that contains it is missing
        return False


def card() -> dict[str, str]:
    """Returns what nvidia-smi says of the GPU, or why it says nothing."""
    fields = "name,driver_version,memory.total,power.limit,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,pstate"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": timing.reason(error)}
    return dict(zip(fields.split(","), map(str.strip, text.splitlines()[0].split(",")), strict=False))


class Results:
    """Keeps GPU.json, GPU.md, GPU.png and GPU.log. The rows of other parts stay in them."""

    def __init__(self, folder: Path, gpu: str):
        self.folder, self.gpu = folder, gpu
        folder.mkdir(parents=True, exist_ok=True)
        self.content: dict[str, Any] = {"gpu": gpu, "sections": {}}
        if self.file("json").exists():
            self.content |= json.loads(self.file("json").read_text())

    def file(self, kind: str) -> Path:
        return self.folder / f"{self.gpu}.{kind}"

    def collect(self) -> None:
        """Writes GPU.json, GPU.md and GPU.log with all rows, machines and versions that items have written so far."""
        for file in FOLDER.glob("*.json"):
            self.content["sections"][file.stem] = json.loads(file.read_text())
        self.file("json").write_text(json.dumps(self.content, indent=1) + "\n")
        self.file("md").write_text(markdown(self.content))
        logs = sorted(FOLDER.glob("*.log"))
        self.file("log").write_text("".join(f"== {log.stem}\n{log.read_text()}" for log in logs))

    def draw(self) -> None:
        if shares := shares_of(self.content):
            draw(self.file("png"), self.gpu, shares)


def markdown(content: dict[str, Any]) -> str:
    lines = [f"# {content['gpu']}", ""]
    for section, part in content["sections"].items():
        versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
        lines += [f"## {section}", "", f"`{part['command']}`, {versions}", ""]
        if card := part["machine"].get("card"):
            lines += [", ".join(f"{name} {value}" for name, value in card.items()), ""]
        for rows in tables(part["rows"]):
            lines += [report.markdown(rows), ""]
    return "\n".join(lines)


def tables(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Returns the rows as tables. Rows that follow each other and have the same columns share one."""
    result: list[list[dict[str, Any]]] = []
    for row in timing.shown(rows):
        if not result or result[-1][0].keys() != row.keys():
            result.append([])
        result[-1].append(row)
    return result


def shares_of(content: dict[str, Any]) -> dict[str, float]:
    """Returns the share of the floor that each call reaches, by name, for the calls that have a floor."""
    rows = [row for part in content["sections"].values() for row in part["rows"]]
    shares = {row["name"]: row["share"] for row in rows if row.get("share") and "floor" in row}
    return shares | {
        row["name"].removesuffix(" / floor"): row["ratio"]
        for row in rows
        if row["name"].endswith(" / floor") and row.get("ratio")
    }


def draw(path: Path, title: str, shares: dict[str, float]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed, so no {path.name}: pip install matplotlib", file=sys.stderr)
        return
    figure = Figure(figsize=(10, 1 + 0.25 * len(shares)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([*shares], [100 * share for share in shares.values()])
    axes.bar_label(bars, fmt="%.0f %%", padding=2, fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.axvline(100, color="black", linewidth=1)
    axes.margins(y=0.002)
    axes.invert_yaxis()
    axes.set_xlabel("share of the floor, %")
    axes.set_title(title)
    figure.savefig(path, dpi=80)


def run_part(name: str, results: Results) -> list[str]:
    """Runs the items that fit and adds their rows to `results`. Returns a line for each that did not end well."""
    part, start, failed = PARTS[name], time.monotonic(), []
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    report.write(str(FOLDER / f"{name}-machine.json"), "gpu", [], card=card(), kernels=pack.key())
    for item in part.items:
        left = part.limit - RESERVE - (time.monotonic() - start)
        if not available(item):
            print(f"== {item.name}: left out, there is no {item.commands[0][0]}", flush=True)
            continue
        if left < (item.least or item.seconds):
            print(f"== {item.name}: left out, {left:.0f} s of {part.limit} are left, and it takes {item.seconds:.0f}")
            continue
        print(f"== {item.name}: about {item.seconds:.0f} s, {left:.0f} are left", flush=True)
        began, known = time.monotonic(), kernels_cached()
        limit = left if item.least else min(left, 2 * item.seconds)
        codes = run_item(item, limit)
        log = (FOLDER / f"{item.name}.log").read_text()
        wrong = [f"ended at {limit:.0f} s" if code is None else f"exit code {code}" for code in codes if code != 0]
        if wrong:
            failed.append(f"{item.name}: {', '.join(wrong)}")
            print(*(log.splitlines()[-LAST_LINES:] if item.quiet else []), failed[-1], sep="\n")
        if item.name in ("learning", "tests"):
            rows = test_rows(log, "; ".join([*wrong, what_tests_lack()]))
            report.write(str(FOLDER / f"{item.name}.json"), "gpu", rows)
        compiled = f", {kernels_cached() - known} kernels compiled meanwhile" if item.name != "kernels" else ""
        print(f"   {time.monotonic() - began:.0f} s{compiled}", flush=True)
        results.collect()
    results.draw()
    return failed


def kernels_cached() -> int:
    return sum(1 for _ in pack.CACHE.glob("*/__grp__*"))


def digest(results: Results) -> str:
    """Returns what is most worth reading. It is short, since a call's output may be cut at its beginning."""
    lines: list[str] = []
    for file in sorted(FOLDER.glob("*.json")):
        rows = results.content["sections"][file.stem]["rows"]
        if file.stem.startswith("checks-"):
            rows = [row for row in rows if row["wrong"]]
        for table in tables(rows):
            short = [{name: str(value)[:70] for name, value in row.items()} for row in table[:MOST_LINES]]
            left = f"... and {len(table) - MOST_LINES} rows more\n" if len(table) > MOST_LINES else ""
            lines.append(f"-- {file.stem}\n{report.table(short)}\n{left}")
    return "\n".join(lines)


def dry_run(names: list[str]) -> None:
    for name in names:
        part = PARTS[name]
        print(f"{name}: {part.limit} s, of which {part.limit - RESERVE} for")
        for item in part.items:
            there = "" if available(item) else "   (not there, left out)"
            print(f"  {item.name}: {item.seconds:.0f} s{there}")
            for command in item.commands:
                print(f"      python3 -m {shlex.join(command)}")
        print(f"  sum: {sum(item.seconds for item in part.items if available(item)):.0f} s")
        if name == "tests":
            print(f"  {what_tests_lack()}")


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["pack"]:
        return pack.main(given[1:])
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}: default: all; or pack; summary")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="benchmarks/results")
    parser.add_argument("--dry_run", action="store_true", help="list what would run, with the seconds it should take")
    asked = parser.parse_args(given)
    out: Path = asked.out.resolve()
    if asked.parts[:1] == ["summary"]:
        return summary([Path(file) for file in asked.parts[1:]], out, parser)
    if unknown := [name for name in asked.parts if name not in PARTS]:
        parser.error(f"{unknown[0]}: the parts are {', '.join(PARTS)}")
    names = asked.parts or [*PARTS]
    if asked.dry_run:
        dry_run(names)
        return 0
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here; `make test bench` needs none", file=sys.stderr)
        return 2
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    results, failed = Results(out, gpu), []
    for name in names:
        failed += run_part(name, results)
        print(digest(results))
    print(f"== results: {results.file('md')}")
    print(*failed, sep="\n", end="\n" if failed else "")
    return 1 if failed else 0


def summary(files: list[Path], out: Path, parser: argparse.ArgumentParser) -> int:
    """Writes one GPU.json, GPU.md and GPU.png from several GPU.json of the same kind of GPU. Returns the exit code.

    Where several files have a section, the last one's counts.
    """
    contents = [json.loads(file.read_text()) for file in files]
    if len({content["gpu"] for content in contents}) != 1:
        parser.error("summary takes the GPU.json files of one kind of GPU")
    results = Results(out, contents[0]["gpu"])
    for content in contents:
        results.content["sections"] |= content["sections"]
    results.collect()
    results.draw()
    print(f"== results: {results.file('md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
