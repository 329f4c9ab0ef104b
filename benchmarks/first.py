"""Measures what must be known first on a GPU: whether the kernels of a step are right there, and how long a step takes.

python3 -m benchmarks.first checks FAMILY|step [--json FILE] [--seconds N]           (a part of `benchmarks.gpu first`)

`checks` runs every distinct call of the step, with the launch configuration of batch 256. On 8 images it is compared
with the reference in float64. Then it runs on 256, which are the 8 over and over, each time in another order: images
must come out with the same bits, and sums must be 32 times as large. The first call of a family also runs as a CUDA
graph. Outputs are poisoned. Each family has a process of its own, since an illegal access ruins a process.
`step` times the trainer's whole step with each --conv, eager and as a CUDA graph, and how long the host takes to issue
it, beside torchvision in a plain loop, all in one process. Then it profiles three steps by kernel (profile.json beside
FILE).
"""

import argparse
import copy
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map

from benchmarks import ops, pack, peers, report, step, timing
from benchmarks.replay import Arguments, arguments, describe, difference, outcome, whole
from benchmarks.trace import Launch, launches, step_calls
from kernels import conv_shape
from kernels.configurations import Configuration
from kernels.conv_shape import ConvShape
from kernels.operators import looked_up_again
from nvcnn.roofline import CONVOLUTIONS, Call

MODEL, BATCH, FEW, DTYPE = "resnet50", 256, 8, torch.float16
STEPS = "triton-gram", "cudnn", "auto"  # a fourth graph of ResNet-50 at this batch may not fit a H100
TOLERANCE = 2e-3  # of the norm: rounding a result to fp16 makes a tenth of it, rounding its operands a fifth
OPTIMIZER = "optimizer"
FAMILIES = {  # the ops of each family, by name
    "forward": ("convolution",),
    "data-gradient": ("convolution_data_gradient",),
    "weight-gradient": ("convolution_weight_gradient",),
    "other-layers": (),
    OPTIMIZER: (),
}
# These ops give a result per image, or a sum over images: what many images give follows from what few give.
BY_IMAGE = {
    "convolution", "convolution_data_gradient", "convolution_weight_gradient", "batch_norm", "batch_norm_data_gradient",
    "batch_norm_gradient_sums", "max_pool", "max_pool_backward", "global_average", "global_average_backward",
    "prepare_input",
}  # fmt: skip
SINGLE = {"nvcnn::cross_entropy", "nvcnn::prepare_input"}  # their references take fp32 vectors with any images
Row = dict[str, Any]
Write = Callable[[list[Row]], None]


def launched() -> list[Launch]:
    """Returns all launches of `benchmarks.gpu first` on the chip that `pack` compiles for."""
    found = [launch for n in (BATCH, FEW) for launch in launched_by(MODEL, n)]
    if find_spec("benchmarks.probes"):
        probes = import_module("benchmarks.probes")
        for name in probes.NAMES:
            found += probes.launches(probes.load(name), pack.CHIP)
    return found


def launched_by(model: str, n: int) -> list[Launch]:
    """Returns all launches of the model's steps on n images, by whatever --conv=auto may choose."""
    calls = dict.fromkeys(call for conv in ops.CONVS for call in step_calls(model, n, DTYPE, conv))
    return [launch for call in calls if call.name.startswith("nvcnn::") for launch in launches(call, pack.CHIP)]


def calls_of(family: str, n: int = FEW) -> list[Call]:
    """Returns the distinct calls of the family in a step on n images, sorted by op."""
    calls = ops.layer_calls(MODEL, n, DTYPE, *ops.CONVS, mixed=True)
    own = {op: name for name, found in FAMILIES.items() for op in found}
    found = [call for call in calls if own.get(call.name.removeprefix("nvcnn::"), "other-layers") == family]
    return sorted(found, key=lambda call: call.name)


@contextmanager
def configured_for(n: int, batch: int) -> Iterator[None]:
    """Has convolutions of n images launched as those of `batch` images are, within its context."""

    def of_batch(op: str, x: Tensor, shape: ConvShape, *rest: Any) -> Configuration:
        return configured(op, x, replace(shape, n=batch) if shape.n == n else shape, *rest)

    configured = conv_shape.configured_for
    with ExitStack() as stack:
        for op in CONVOLUTIONS:
            module = import_module(op.replace("nvcnn::", "kernels."))
            stack.enter_context(mock.patch.object(module, "configured_for", of_batch))
        stack.enter_context(looked_up_again())
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills fresh memory with NaN within its context, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def each_tensor(function: Callable[[Tensor], Tensor], made: Arguments) -> Arguments:
    return tree_map(lambda value: function(value) if isinstance(value, Tensor) else value, made)


def reference(call: Call, made: Arguments) -> list[Tensor]:
    """Returns the call's results by its reference, in float64. Ops in SINGLE keep their fp32 tensors as they are."""
    narrow = torch.finfo(torch.float16).bits if call.name in SINGLE else torch.finfo(torch.float32).bits

    def wide(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() and torch.finfo(t.dtype).bits <= narrow else t.clone()

    made = each_tensor(wide, made)
    if call.name == "nvcnn::max_pool_backward" and made["argmax"].dtype == torch.uint8:
        index, inside = index_of(made["argmax"], made, made["height"], made["width"])
        made |= {"argmax": index, "dy": made["dy"] * inside}
    with mock.patch.dict(os.environ, NVCNN_KERNELS="reference"):
        return outcome(call, made)


def index_of(position: Tensor, window: Arguments, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns the index in the image of each maximum of a pooling, and whether it is inside of the image.

    position: where in its window each maximum is.
    """
    oh, ow = (
        torch.arange(n, device=position.device) * window["stride"] - window["padding"] for n in position.shape[2:]
    )
    h = oh.view(-1, 1) + position.long() // window["kernel_size"]
    w = ow + position.long() % window["kernel_size"]
    inside = (h >= 0) & (h < height) & (w >= 0) & (w < width)
    return torch.where(inside, h * width + w, 0), inside


def copied(made: Arguments) -> Arguments:
    return each_tensor(Tensor.clone, made)


def check(call: Call, device: torch.device, n: int, times: int, *, graph: bool) -> Row:
    """Returns the row of a call: its error on n images, and what is wrong with it, there and on n x times images."""
    torch.manual_seed(0)
    made = arguments(call, device)
    ours, exact = outcome(call, copied(made)), whole(reference(call, made))
    comparable = list(ours)
    if call.name == "nvcnn::max_pool" and ours[-1].dtype == torch.uint8:
        comparable[-1] = index_of(ours[-1], made, *made["x"].shape[2:])[0]
    errors = [difference(a, b) for a, b in zip(whole(comparable), exact, strict=True)]
    wrong = [] if all(error <= TOLERANCE for error in errors) else [f"{n} images: {shown(errors)}"]
    if not all(map(torch.equal, outcome(call, copied(made)), ours)):
        wrong.append("a second call gives other bits")
    if graph and not all(map(torch.equal, replayed(call, made, device), ours)):
        wrong.append("a CUDA graph gives other bits")
    if call.name.removeprefix("nvcnn::") in BY_IMAGE:
        order = torch.cat([torch.randperm(n) for _ in range(times)]).to(device)
        many = outcome(call, each_tensor(partial(repeated, n=n, order=order), made))
        for result, few, of_few in zip(many, ours, exact, strict=True):
            if result.dim() > 1 and result.shape[0] == n * times != few.shape[0]:
                same = torch.equal(result, few[order])
                wrong += [] if same else [f"{n * times} images: other bits in {differing(result, few[order])}"]
            else:
                (total,) = whole([result])
                error = difference(total, times * of_few)
                wrong += [] if error <= TOLERANCE else [f"{n * times} images: sums off by {error:.1e}"]
    return {"name": describe(call), "error": shown(errors), "wrong": "; ".join(wrong)}


def shown(errors: list[float]) -> str:
    return " ".join(f"{error:.1e}" for error in errors)


def differing(a: Tensor, b: Tensor) -> str:
    return f"{(a != b).flatten(1).any(1).sum().item()} of them"


def repeated(tensor: Tensor, n: int, order: Tensor) -> Tensor:
    """Returns a tensor of n images with its images in that order, in the same layout; of another tensor a copy."""
    if not tensor.dim() or tensor.shape[0] != n:
        return tensor.clone()
    shape = len(order), *tensor.shape[1:]
    return torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor[order])


def replayed(call: Call, made: Arguments, device: torch.device) -> list[Tensor]:
    """Returns the results that a CUDA graph of the call gives."""
    results: list[list[Tensor]] = []
    own = copied(made)
    timing.captured(lambda: results.append(outcome(call, own)), device)()
    return results[-1]


def check_optimizer(device: torch.device) -> Row:
    """Returns the row of one step of LARC. The references start from the same weights and gradients."""
    ours = ops.optimizer(MODEL, device, DTYPE)
    theirs = copy.deepcopy(ours)
    before = ours.arena.weight.clone()
    ours.step()
    with mock.patch.dict(os.environ, NVCNN_KERNELS="reference"):
        theirs.step()
    pairs = (ours.arena.momentum, theirs.arena.momentum), (ours.ratio, theirs.ratio), (ours.counters, theirs.counters)
    weight, change = theirs.arena.weight, theirs.arena.weight - before
    # An update is small beside the weight, so that the weight's last bit, in which the two may differ, matters.
    allowed = weight.abs() * 2**-22 + change.abs() * TOLERANCE
    off = ((ours.arena.weight - weight).abs() <= allowed).logical_not().double().mean().item()
    errors = [off, *(difference(*pair) for pair in pairs)]
    wrong = "" if all(error <= TOLERANCE for error in errors) else "weights, momentum, ratios or counters differ"
    return {"name": f"the optimizer's step, {MODEL}", "error": shown(errors), "wrong": wrong}


def check_all(family: str, device: torch.device, write: Write, end: float) -> list[Row]:
    """Returns a row for each call of the family until `end`, and one for what is left. Stops when the GPU is lost."""
    if family == OPTIMIZER:
        rows = [check_optimizer(device)]
        write(rows)
        return rows
    rows, calls = [], calls_of(family)
    with configured_for(FEW, BATCH), poisoned():
        for call in calls:
            blank = {"name": describe(call), "error": ""}
            if time.monotonic() > end:
                rows.append(blank | {"wrong": f"not checked: time is up, with {len(calls) - len(rows)} to go"})
                break
            write([*rows, blank | {"wrong": "the process ended here"}])
            try:
                rows.append(check(call, device, FEW, BATCH // FEW, graph=not rows))
            except Exception as error:  # the compiler, the launcher or the GPU may raise it
                rows.append(blank | {"wrong": timing.reason(error)})
                if timing.lost(error):
                    break
            torch.cuda.empty_cache()
    write(rows)
    return rows


def contenders(case: step.Case) -> dict[str, Callable[[], timing.Step]]:
    """Returns what makes each step, by "NAME, eager" and "NAME, graph"."""
    found: dict[str, Callable[[], timing.Step]] = {
        f"nvcnn --conv={conv}, {how}": partial(step.ours, case, conv, cuda_graph=graph)
        for conv in STEPS
        for how, graph in (("eager", "off"), ("graph", "on"))
    }
    return found | {"torchvision, eager": partial(step.torchvision, case)}


def host(one: timing.Step, device: torch.device) -> float:
    """Returns the milliseconds that the host takes to issue the step to an idle GPU, the median of five."""
    found = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        one()
        found.append((time.perf_counter() - start) * 1e3)
    return median(found)


def measure_steps(
    case: step.Case, makes: dict[str, Callable[[], timing.Step]], write: Write, *, rounds: int
) -> tuple[list[Row], dict[str, timing.Step]]:
    """Returns a row for each algorithm and peer, and the steps that run: first each by itself, then all in turns."""
    steps: dict[str, timing.Step] = {}
    times: dict[str, list[float]] = {}
    hosts: dict[str, float] = {}
    notes: dict[str, str] = {}

    def rows() -> list[Row]:
        return step_rows(case, list(makes), times, hosts, notes)

    for name, make in makes.items():
        notes[name] = "the process ended here"
        write(rows())
        try:
            one = make()
            times |= timing.alternate({name: one}, case.device, rounds=1, repeat=2, warm_up=4)
            hosts[name] = host(one, case.device)
            steps[name] = one
            del notes[name]
        except Exception as error:  # whatever a contender raises is its result
            notes[name] = timing.reason(error)
            if timing.lost(error):
                write(rows())
                raise
        gc.collect()
    write(rows())
    times |= timing.alternate(steps, case.device, rounds=rounds, repeat=3)
    write(rows())
    return rows(), steps


def step_rows(
    case: step.Case, names: list[str], times: dict[str, list[float]], hosts: dict[str, float], notes: dict[str, str]
) -> list[Row]:
    """Returns rows with the milliseconds of eager, graph and host, and the images/s of the faster of the first two."""
    rows: dict[str, Row] = {}
    for title in names:
        name, _, how = title.rpartition(", ")
        blank = dict.fromkeys(("eager ms", "graph ms", "host ms", "images/s"))
        row = rows.setdefault(name, {"name": name} | blank | {"note": f"both with {peers.CUDNN}"})
        if title in times:
            ms = median(times[title])
            row[f"{how} ms"] = timing.significant(ms)
            row["images/s"] = max(row["images/s"] or 0.0, timing.significant(case.batch / ms * 1e3))
        if how == "eager" and title in hosts:
            row["host ms"] = timing.significant(hosts[title])
        if title in notes:
            row["note"] += f"; {how}: {notes[title]}"
    return list(rows.values())


def profiled(name: str, one: timing.Step, device: torch.device, most: int = 40) -> list[Row]:
    """Returns a row for each kernel (on a CPU: operator) that takes most of three steps, with its share of a step."""
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
        for _ in range(3):
            one()
        if gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    times = [
        (event.self_device_time_total if gpu else event.self_cpu_time_total, event.count, event.key)
        for event in found.key_averages()
        if event.device_type == kind
    ]
    total = sum(us for us, _, _ in times)
    return [
        {
            "name": f"{name}: {key[:90]}",
            "calls": timing.significant(count / 3),
            "ms": timing.significant(us / 3e3),
            "share": timing.significant(us / total),
        }
        for us, count, key in sorted(times, reverse=True)[:most]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.first", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("item", choices=("checks", "step"))
    parser.add_argument("family", nargs="?", choices=FAMILIES, help="of checks")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="write the rows there")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing later (no limit)")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    if (asked.item == "checks") != (asked.family is not None):
        parser.error("checks takes a family, step none")
    device, end = torch.device("cuda"), time.monotonic() + asked.seconds

    def write(rows: list[Row], file: Path = asked.json) -> None:
        report.write(str(file), "first", rows)

    if asked.item == "checks":
        rows = check_all(asked.family, device, write, end)
        wrong = [row for row in rows if row["wrong"]]
        print(f"{asked.family}: {len(rows) - len(wrong)} of {len(rows)} right")
        print(*(f"  {row['name'][:90]}: {row['wrong']}" for row in wrong), sep="\n", end="\n" if wrong else "")
        return 1 if wrong else 0
    rows, steps = measure_steps(step.GPU, contenders(step.GPU), write, rounds=5)
    print(report.table(timing.shown(rows)))
    kernels: list[Row] = []
    for name in ("nvcnn --conv=triton, eager", "nvcnn --conv=auto, eager"):
        if name in steps and time.monotonic() < end:
            kernels += profiled(name.removesuffix(", eager"), steps[name], device)
            write(kernels, asked.json.with_name("profile.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
