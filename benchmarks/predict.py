"""Predicts how long each call of a training step takes on a H100 and a H200, from its compiled kernels, without a GPU.

python -m benchmarks.predict [--conv triton|triton-materialized|triton-gram|...|all] [--model resnet50] [--batch 256]
                             [--dtype fp16|bf16] [--gpu H100 H200] [--only NAME] [--table NAME] [--fit] [--json FILE]

Five things limit a launch. They overlap, but not wholly, so it takes more than the longest and less than their sum:
    LAUNCH + sqrt(memory^2 + L2^2 + products^2 + issue^2 + latency^2)
    memory    the bytes that the call must move (`roofline`), over the copy bandwidth
    L2        the bytes of the tiles that its programs load and store, over 64 a cycle and SM
    products  the FLOPs of its tiles, with what pads them, over the matrix rate
    issue     waves x instructions of a warp x (warps a scheduler + STALL) cycles: each of an SM's four schedulers
              issues one a cycle, and a warp's next instruction waits for the one before
    latency   waves x LATENCY: what the programs of a wave wait for together, first loads, barriers, last stores
A wave is as many programs as fit the SMs at once; the last counts as a whole one. Instructions are SASS, and turns of
loops those of the first program (`instructions`). Where a call has several launches, those with fewer bytes find them
in the L2 cache, unless it is smaller. STALL, LATENCY and LAUNCH are fitted to the H100's call-by-call figures in
benchmarks/results/; all else is counted, or a data sheet's, or `roofline`'s. Waits of wgmma that ptxas serialises, and
the lower rate of products by fewer than 4 warps, are left out.

PyTorch's convolutions take what cuDNN's alone took there ("cuDNN"), if such a one was measured; other operators of
PyTorch take the floor ("floor"). Measured are calls of the name and bytes that the results have. --conv=all has the
calls of all algorithms, as the results do, and no step. --fit fits the constants to the H100's calls, and prints how
those fitted without an op's calls predict them: sensible as long as the kernels are those that were measured.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from statistics import correlation, median, quantiles
from typing import Any, NamedTuple

import torch

from benchmarks import report
from benchmarks.codegen import programs_an_sm
from benchmarks.instructions import Code, code_of, executed, resource_usage, sass_of, work_of
from benchmarks.ops import LIBRARY, layer_calls
from benchmarks.replay import describe
from benchmarks.timing import shown, significant
from benchmarks.trace import Launch, compiled, launches, step_calls
from kernels.configurations import SMS, cdiv
from kernels.implementation import INTERPRETED
from nvcnn.kernel_choices import CANDIDATES
from nvcnn.models import ALGORITHMS, MODELS
from nvcnn.roofline import CONVOLUTIONS, GPU, Call, bytes_of, flops_of
from nvcnn.roofline import GPUS as ALL_GPUS

CHIP = 90
GPUS = {gpu.name: gpu for gpu in ALL_GPUS if gpu.name in ("H100", "H200")}
CLOCK = 989.4e12 / (SMS * 4096)  # cycles a second: the data sheet's FLOPs of fp16, of which an SM does 4096 a cycle
L2_RATE = 64 * SMS * CLOCK  # bytes a second
L2_SIZE = 50e6
RESULTS = Path(__file__).parent / "results"
Rows = list[dict[str, Any]]


class Constants(NamedTuple):
    stall: float  # cycles
    latency: float  # seconds
    launch: float  # seconds, as a node of a CUDA graph


FITTED = Constants(stall=3.1, latency=0.5e-6, launch=2.1e-6)  # by --fit --conv=all, with Triton 3.6, as was measured


class Kernel(NamedTuple):
    """Describes a launch. Bytes and FLOPs are those of all programs, instructions those of a warp."""

    programs: int
    fit: int  # programs that fit an SM
    warps: int
    instructions: float
    bytes: float
    flops: float


class Measured(NamedTuple):
    name: str
    bytes: float
    flops: float
    us: float
    library_us: float | None


class Known(NamedTuple):
    """What a fit takes: a call that was measured."""

    op: str
    kernels: Sequence[Kernel]
    memory: float
    us: float

    def ratio(self, gpu: GPU, constants: Constants) -> float:
        return predicted(self.kernels, self.memory, gpu, constants)[0] * 1e6 / self.us


def limits(kernel: Kernel, memory: float, gpu: GPU, constants: Constants) -> dict[str, float]:
    """Returns the seconds of each limit. memory: the bytes that the launch moves to and from it."""
    together = min(kernel.fit, cdiv(kernel.programs, SMS))
    waves = cdiv(kernel.programs, SMS * together)
    return {
        "memory": memory / gpu.bandwidth,
        "L2": kernel.bytes / L2_RATE,
        "products": kernel.flops / gpu.rate,
        "issue": waves * kernel.instructions * (together * kernel.warps / 4 + constants.stall) / CLOCK,
        "latency": waves * constants.latency,
    }


def predicted(kernels: Sequence[Kernel], memory: float, gpu: GPU, constants: Constants) -> tuple[float, str]:
    """Returns a call's seconds, and what limits its largest launch. memory: the bytes that the call must move."""
    first, *others = sorted(kernels, key=lambda kernel: -kernel.bytes)
    each = [limits(first, memory, gpu, constants)]
    each += [limits(kernel, kernel.bytes * (kernel.bytes > L2_SIZE), gpu, constants) for kernel in others]
    return sum(constants.launch + math.hypot(*one.values()) for one in each), max(each[0], key=each[0].__getitem__)


def compile_kernel(launch: Launch) -> tuple[str, Code, int, int]:
    """Returns Triton's IR, the instructions, the warps, and how many programs fit an SM. Raises ValueError if none."""
    kernel = compiled(launch)
    cubin, warps = kernel.asm["cubin"], kernel.metadata.num_warps
    fit = programs_an_sm(launch.chip, resource_usage(cubin)[0], kernel.metadata.shared, warps)
    if not fit:
        raise ValueError(f"a program does not fit an SM: {launch.name}")
    return kernel.asm["ttir"], code_of(sass_of(cubin), warps), warps, fit


def kernel_of(launch: Launch, ttir: str, code: Code, warps: int, fit: int) -> Kernel:
    """Returns what the launch does, by its first program; of axis 1, which has classes of pixels, the first four."""
    rows = range(min(4, (*launch.grid, 1)[1]))
    works = [work_of(ttir, launch.sizes, (0, row), launch.grid) for row in rows]
    each = [(executed(code, work), work.bytes, work.flops) for work in works]
    instructions, size, flops = (sum(column) / len(rows) for column in zip(*each, strict=True))
    programs = math.prod(launch.grid)
    return Kernel(programs, fit, warps, instructions, programs * size, programs * flops)


def kernels_of(calls: Iterable[Call], table: str, workers: int) -> dict[Call, list[Kernel]]:
    """Returns what the project's own calls launch, compiled in parallel processes; Triton's cache keeps it."""
    started = {call: launches(call, CHIP, table) for call in calls if call.name.startswith("nvcnn::")}
    distinct = list(dict.fromkeys(launch for found in started.values() for launch in found))
    with ProcessPoolExecutor(workers) as pool:
        made = dict(zip(distinct, pool.map(compile_kernel, distinct), strict=True))
    return {call: [kernel_of(launch, *made[launch]) for launch in found] for call, found in started.items()}


@cache
def results(gpu: str) -> dict[str, Any]:
    (file,) = RESULTS.glob(f"nvidia-{gpu.lower()}*.json")
    return json.loads(file.read_text())["sections"]


def measured(gpu: str) -> list[Measured]:
    """Returns the calls that were measured; their bytes and FLOPs follow from the rates in the notes."""
    found = []
    for row in results(gpu)["call-by-call"]["rows"]:
        if us := row["ours"]:
            rate, flops, *_ = *(float(part.split()[0]) for part in row["note"].split(",")), 0.0
            found.append(Measured(row["name"], rate * us * 1e3, flops * us * 1e6, us, row[LIBRARY]))
    return found


def title_of(call: Call) -> str:
    """Returns the call as results name it; PyTorch's convolutions as the project's, without what is fused."""
    if call.name not in ("aten::convolution", "aten::convolution_backward"):
        return describe(call)
    op, x, weight = "convolution", call["input"], call["weight"]
    if call.name == "aten::convolution_backward":
        data = call["output_mask"][0]
        op, x = f"convolution_{'data' if data else 'weight'}_gradient", call["grad_output"]
        weight = weight if data else call.outputs[0]
    k, _, r, s = weight.shape
    return f"{op} {' x '.join(map(str, x.shape[1:]))} weight {k} x {r} x {s} stride {call['stride'][0]}"


def near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=2e-3)  # the results have four digits of each


def times_of(call: Call, kernels: Sequence[Kernel], gpu: GPU, figures: Iterable[Measured]) -> dict[str, Any]:
    """Returns microseconds: predicted (""), the floor, measured; "by" says what limits it, or where it is from."""
    memory, flops, title = bytes_of(call), flops_of(call), title_of(call)
    floor = max(memory / gpu.bandwidth, flops / gpu.rate) * 1e6
    if kernels:
        seconds, by = predicted(kernels, memory, gpu, FITTED)
        us = next((one.us for one in figures if one.name == title and near(one.bytes, memory)), None)
        return {"": seconds * 1e6, "floor": floor, "by": by, "measured": us, "ratio": us and seconds * 1e6 / us}
    alike = [one for one in figures if f"{one.name} ".startswith(f"{title} ") and near(one.flops, flops)]
    library = [one.library_us for one in alike if one.library_us]
    time, by = (median(library), "cuDNN") if library else (floor, "floor")
    return {"": time, "floor": floor, "by": by, "measured": None, "ratio": None}


def sums_of(rows: Rows, gpus: Sequence[str], batch: int) -> Rows:
    """Returns milliseconds by op, the longest first, then of all calls, and the images/s of a step that has them."""
    sums: dict[str, dict[str, Any]] = {}
    columns = [name + key for name in gpus for key in ("", " floor")]
    for row in rows:
        for op in (row["name"].split()[0], "all"):
            total = sums.setdefault(op, {"name": op, "calls": 0} | dict.fromkeys(columns, 0.0))
            total["calls"] += row["calls"]
            for column in columns:
                total[column] += row["calls"] * row[column] / 1e3
    every = sums.pop("all")
    images = {"name": "images/s", "calls": None} | {column: batch / every[column] * 1e3 for column in columns}
    return [*sorted(sums.values(), key=lambda row: -row[gpus[0]]), every, images]


def spread(ratios: Sequence[float]) -> str:
    parts = quantiles(ratios, n=20, method="inclusive")
    inner, outer = f"{parts[4]:.2f} - {parts[14]:.2f}", f"{parts[0]:.2f} - {parts[18]:.2f}"
    return f"median {parts[9]:.2f}, quartiles {inner}, from 5 to 95 % {outer}"


def ranks(values: Iterable[float]) -> list[int]:
    order = sorted(values := list(values))
    return [order.index(value) for value in values]


def fitted(known: Sequence[Known], gpu: GPU) -> Constants:
    """Returns the constants with the least squares of log(predicted / measured), changing one at a time, ever less."""

    def error(constants: Constants) -> float:
        return sum(math.log(one.ratio(gpu, constants)) ** 2 for one in known)

    best, factor = FITTED, 1.5
    while factor > 1.01:
        tries = [best._replace(**{k: v * f}) for k, v in best._asdict().items() for f in (factor, 1 / factor)]
        if error(found := min(tries, key=error)) < error(best):
            best = found
        else:
            factor = math.sqrt(factor)
    return best


def fits(known: Sequence[Known], gpu: GPU) -> str:
    """Returns, as text, the constants fitted to all calls, and how those fitted without an op predict its calls."""
    lines, held_out = [f"fitted: {fitted(known, gpu)}"], list[float]()
    for op in sorted({one.op for one in known}):
        constants = fitted([one for one in known if one.op != op], gpu)
        ratios = [one.ratio(gpu, constants) for one in known if one.op == op]
        held_out += ratios
        lines.append(f"without {op}: {constants}; its {len(ratios)} calls: {spread(ratios)}")
    return "\n".join([*lines, f"each op by the constants without it: {spread(held_out)}"])


def table(rows: Rows) -> str:
    return report.table(shown([{k: significant(v) if isinstance(v, float) else v for k, v in r.items()} for r in rows]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=("fp16", "bf16"), default="fp16")
    parser.add_argument("--conv", choices=(*ALGORITHMS, "all"), default="triton")
    parser.add_argument("--gpu", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--only", metavar="NAME", default="", help="only calls whose name contains it")
    parser.add_argument("--table", default="", help="launch configurations of kernels/configs/TABLE.json (computed)")
    parser.add_argument("--fit", action="store_true", help="fit the constants to the H100's calls")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    parser.add_argument("--workers", type=int, default=2, help="compilers at a time (2)")
    asked = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 replaces the compiler: unset it")
    step = asked.model, asked.batch, {"fp16": torch.float16, "bf16": torch.bfloat16}[asked.dtype]
    calls = layer_calls(*step, *CANDIDATES) if asked.conv == "all" else Counter(step_calls(*step, asked.conv))
    counts = {call: n for call, n in calls.items() if asked.only in title_of(call)}
    if not counts:
        parser.error(f"no call's name contains {asked.only}")
    kernels = kernels_of(counts, asked.table, asked.workers)
    figures = {name: measured(name) if asked.dtype == "fp16" else [] for name in asked.gpu}
    rows: Rows = []
    known: dict[str, list[Known]] = {name: [] for name in asked.gpu}
    for call, n in counts.items():
        rows.append({"name": title_of(call), "calls": n})
        for name in asked.gpu:
            times = times_of(call, kernels.get(call, ()), GPUS[name], figures[name])
            rows[-1] |= {f"{name} {key}".strip(): value for key, value in times.items()}
            if us := times["measured"]:
                op = call.name if call.name in CONVOLUTIONS else "others"
                known[name].append(Known(op, kernels[call], bytes_of(call), us))
    rows.sort(key=lambda row: -row["calls"] * row[asked.gpu[0]])
    if asked.json:
        report.write(asked.json, "predict", rows)
    print(f"predicted microseconds\n{table(rows)}\n")
    if asked.conv != "all" and not asked.only:
        print(f"predicted milliseconds\n{table(sums_of(rows, asked.gpu, asked.batch))}\n")
    for name, found in known.items():
        if len(found) > 1:
            ratios = [one.ratio(GPUS[name], FITTED) for one in found]
            times_and_ranks = (
                ranks(r * one.us for r, one in zip(ratios, found, strict=True)),
                ranks(o.us for o in found),
            )
            print(f"{name}, predicted / measured: {len(found)} calls, {spread(ratios)}, rank correlation "
                  f"{correlation(*times_and_ranks):.2f}")  # fmt: skip
        if name == "H100" and asked.fit:
            print(fits(found, GPUS[name]))
        steps = {row["name"]: row["graph ms"] for row in results(name)["step"]["rows"]}
        if step == ("resnet50", 256, torch.float16) and not asked.only and f"nvcnn --conv={asked.conv}" in steps:
            print(f"{name}, the step as a graph, measured before: {steps[f'nvcnn --conv={asked.conv}']} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
