"""Everything that needs a GPU, in one go: the tests with compiled kernels, the ops, the layers, the convolutions, the
whole step.

python3 -m benchmarks.gpu [tests|ops|layers|conv|step] [--out DIR]        (`make gpu`)

Needs PyTorch, Triton and pytest, no network. Each part is a process of its own with a limit of 8 minutes, and writes
GPU.PART.json (and .log) as it goes; GPU.md and GPU.png are made of what is there after each. Exit code 1 if a test
fails or a part does not end well, 2 without a GPU.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from benchmarks import report, timing

LIMIT = 480  # seconds a part
PARTS = {
    # Not tests/nvcnn/data, tests/end_to_end and tests/test_install.py: they are about packages, not about the GPU.
    "tests": ["pytest", "-vv", "-p", "no:cacheprovider", "--ignore=tests/nvcnn/data", "tests/kernels", "tests/nvcnn"],
    "ops": ["benchmarks.ops", "--device=cuda"],
    "layers": ["benchmarks.layers", *["batch_norm", "max_pool", "global_average", "cross_entropy", "prepare_input"]],
    "conv": ["benchmarks.layers", "convolution", "bottleneck"],
    "step": ["benchmarks.step", "--device=cuda"],
}


def run_part(command: list[str], log: Path, limit: float) -> int | None:
    """Runs `python -m command` with its output here and in `log`. Its exit code, or None if it was ended at `limit`."""
    ended: list[bool] = []
    with (
        log.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-u", "-m", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=Path(__file__).parents[1],
            start_new_session=True,  # so that it can be ended with its children
        ) as process,
    ):

        def end() -> None:
            ended.append(True)
            os.killpg(process.pid, signal.SIGKILL)

        timer = Timer(limit, end)
        timer.start()
        try:
            assert process.stdout
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return None if ended else code


def test_rows(log: str, note: str) -> list[dict[str, Any]]:
    """One row from pytest's verbose output, whole or cut off: how many passed, of how many that ran, and which not."""
    results = re.findall(r"^(tests/.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b.*\[ *\d+%\]$", log, re.MULTILINE)
    # A file that cannot be imported has no results; the closing summary names it.
    results += [(name, "ERROR") for name in re.findall(r"^ERROR (tests/[^:\s]+)(?: - .*)?$", log, re.MULTILINE)]
    counts = Counter(outcome for _, outcome in results)
    passed, skipped = counts["PASSED"], counts["SKIPPED"]
    bad = [name for name, outcome in results if outcome in ("FAILED", "ERROR")]
    ran = len(results) - skipped
    row = timing.missing("tests passed / run", "tests", "; ".join(filter(None, [note, f"{skipped} skipped", *bad])))
    return [row | {"ours": passed, "peer": ran, "ratio": timing.significant(passed / ran) if ran else None}]


def summarize(folder: Path, gpu: str) -> None:
    """GPU.md, a table for each part that is there, and GPU.png, the share of the floor that each op reaches."""
    lines = [f"# {gpu}", ""]
    shares: dict[str, float] = {}
    for part in PARTS:
        file = folder / f"{gpu}.{part}.json"
        if not file.exists():
            continue
        content = json.loads(file.read_text())
        rows = timing.shown(content["rows"])
        versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
        lines += [f"## {part}", "", f"`{content['command']}`, {versions}", ""]
        lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
        lines.append("")
        shares |= {row["name"]: row["ratio"] for row in rows if row["name"].endswith("/ floor")}
    (folder / f"{gpu}.md").write_text("\n".join(lines))
    if shares:
        draw(folder / f"{gpu}.png", gpu, shares)


def draw(path: Path, title: str, shares: dict[str, float]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not installed, so no {path.name}: pip install matplotlib", file=sys.stderr)
        return
    figure = Figure(figsize=(8, 1 + 0.5 * len(shares)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([name.removesuffix(" / floor") for name in shares], [100 * share for share in shares.values()])
    axes.bar_label(bars, fmt="%.0f %%", padding=2)
    axes.axvline(100, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("share of the floor, %")
    axes.set_title(title)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", nargs="?", choices=[*PARTS], help="default: all of them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="benchmarks/results")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here; `make test bench` needs none", file=sys.stderr)
        return 2
    out: Path = asked.out.resolve()
    gpu = re.sub(r"\W+", "-", torch.cuda.get_device_name()).lower()
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in [asked.part] if asked.part else PARTS:
        file = out / f"{gpu}.{part}.json"
        log = file.with_suffix(".log")
        file.unlink(missing_ok=True)
        print(f"== {part}: at most {LIMIT // 60} minutes", flush=True)
        command = PARTS[part] + ([] if part == "tests" else [f"--json={file}"])
        code = run_part(command, log, LIMIT)
        how = f"ended at the limit of {LIMIT} s" if code is None else f"exit code {code}" if code else ""
        if part == "tests":
            report.write(str(file), "gpu", test_rows(log.read_text(), how))
        if how:
            failed.append(f"{part}: {how}")
        summarize(out, gpu)
    print(f"== results: {out}/{gpu}.md")
    print(*failed, sep="\n", end="\n" if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
