"""Times each op of ResNet-50's step against the floor that memory sets, and the optimizer's step against others.

python -m benchmarks.ops [optimizer|layers] [--device=cpu|cuda] [--json FILE] [--seconds N]

The floor of an op is the time for the bytes it must move at the copy bandwidth of the same rounds, or for its FLOPs at
their matrix rate, whichever is longer; a `ratio` of 0.9 means that the op reaches 90 % of it. On a GPU gradients, model
weights and activations (batch 256) are fp16, and each op is timed as a CUDA graph over several arenas or sets of
tensors in turn, which together exceed any cache; whole optimizer steps are timed as their users call them. On a CPU the
layers' ops are left out, since the references that run there are not made for one pass. A step's convolutions stand
beside cuDNN's convolutions alone, without what is fused into ours.
"""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import torch

import kernels
from benchmarks import peers, report, timing
from benchmarks.replay import argument_sets, describe, library, replay
from benchmarks.trace import step_calls
from nvcnn import roofline
from nvcnn.cuda_graph import quick_captures
from nvcnn.kernel_choices import CANDIDATES
from nvcnn.models import build_model
from nvcnn.optimizer.arena import Arena
from nvcnn.optimizer.larc import Larc
from nvcnn.roofline import Call

OPS = ("gradient_statistics", "trust_ratio", "larc_update")
ARENAS = 3
LIBRARY = "cuDNN alone"
CONVS = CANDIDATES  # a run on a GPU mixes these
Rows = list[dict[str, Any]]


def copy(size: int, device: torch.device) -> timing.Step:
    """Returns a step that reads `size` bytes and writes as many.

    It is a kernel: as a node of a CUDA graph, `copy_` moved 2.4 TB/s on a H100 where kernels move 2.8.
    """
    source, target = torch.randn(2, size // 4, device=device)
    return partial(torch.neg, source, out=target)


def matmul(n: int, dtype: torch.dtype, device: torch.device) -> timing.Step:
    """Returns a step of 2 n^3 FLOPs on random values, since zeros draw less power and run faster."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def ceilings(device: torch.device, dtypes: Iterable[torch.dtype], *, size: int, n: int, rounds: int) -> Rows:
    """Returns rows of what this machine does at best: its copy bandwidth and its matrix rate in each dtype.

    The bandwidth, in GB/s, counts bytes read and bytes written; the rate is in TFLOP/s.
    """
    work = {f"ceiling: copy of {size >> 20} MiB": (2 * size / 1e9, "GB/s", copy(size, device))}
    for dtype in dtypes:
        name = f"ceiling: {n} x {n} matmul, {str(dtype).removeprefix('torch.')}"
        work[name] = 2 * n**3 / 1e12, "TFLOP/s", matmul(n, dtype, device)
    steps = {name: step for name, (_, _, step) in work.items()}
    times = timing.alternate(steps, device, rounds=rounds, repeat=10, warm_up=3)
    return [
        timing.missing(name, unit, "") | {"peer": timing.significant(amount / median(times[name]) * 1e3)}
        for name, (amount, unit, _) in work.items()
    ]


def optimizer(model: str, device: torch.device, dtype: torch.dtype) -> Larc:
    network = build_model(model, num_classes=1000, seed=0)
    names = [name for name, _ in network.named_parameters()]
    arena = Arena(network, reversed(names), device=device, dtype=dtype)
    for slot in arena.slots:
        arena.gradient(slot).normal_(std=1e-3)
    return Larc(arena, schedule=torch.tensor([1e-4]), mode="clip", eta=1e-3)


def launches(larc: Larc) -> dict[str, timing.Step]:
    """Returns the three launches of `larc.step`, each as a step of its own, with the same arguments."""
    with mock.patch.multiple(kernels, **dict.fromkeys(OPS, mock.DEFAULT)) as calls:
        larc.step()
    return {op: partial(getattr(kernels, op), *calls[op].call_args.args, **calls[op].call_args.kwargs) for op in OPS}


def bytes_of(arena: Arena) -> dict[str, int]:
    """Returns the bytes that each op must move, without the arena's padding. Master weight and momentum are fp32."""
    sizes = [slot.parameter.numel() for slot in arena.slots]
    matrix = sum(n for n, slot in zip(sizes, arena.slots, strict=True) if slot.start < arena.matrix_elements)
    vector = sum(sizes) - matrix
    gradient = arena.matrix_gradient.element_size()
    weight_copy = 0 if arena.model_weight is None else arena.model_weight.element_size()
    return {
        "gradient_statistics": matrix * (gradient + 4) + vector * (4 + 4),
        "larc_update": matrix * (gradient + 16 + weight_copy) + vector * (4 + 16),
    }


def floor(needed: int, flops: int, times: dict[str, list[float]], *, size: int, n: int) -> list[float]:
    """Returns the least milliseconds that the work can take, for each round.

    They follow from the round's times of the "copy" of `size` bytes and the "matmul" of n x n matrices.
    """
    memory = [ms * needed / (2 * size) for ms in times["copy"]]
    if not flops:
        return memory
    return [max(least, ms * flops / (2 * n**3)) for least, ms in zip(memory, times["matmul"], strict=True)]


def rates(needed: int, flops: int, us: float) -> str:
    """Returns, as text, the rates of what moves so many bytes and does so many FLOPs in so many microseconds."""
    return f"{timing.significant(needed / us / 1e3)} GB/s" + (
        f", {timing.significant(flops / us / 1e6)} TFLOP/s" if flops else ""
    )


def layer_calls(model: str, batch: int, dtype: torch.dtype, *convs: str, mixed: bool = False) -> Counter[Call]:
    """Returns the calls of the project's ops in a step of the model, and how often each occurs.

    The optimizer's are left out. A call that occurs with several --conv of `convs` counts as with the one that has it
    most often. mixed: with the calls of mixed batches, too.
    """
    optimizer_ops = {f"nvcnn::{op}" for op in OPS}
    calls: Counter[Call] = Counter()
    for conv in convs:
        calls |= Counter(step_calls(model, batch, dtype, conv))
    if mixed:  # others are the input and the loss
        calls |= Counter(step_calls(model, batch, dtype, convs[0], mixed=True))
    ours = {call: n for call, n in calls.items() if call.name.startswith("nvcnn::") and call.name not in optimizer_ops}
    return Counter(ours)


def measure_layers(
    calls: Counter[Call], device: torch.device, dtype: torch.dtype, *, size: int, n: int, rounds: int
) -> Iterator[dict[str, Any]]:
    """Yields a row for each call, the heaviest first: ours, the library's convolution alone, and the floor.

    Times are in microseconds. Ours is what a step calls, with what is fused into it. The floor of its bytes and FLOPs
    follows from the copy and the matrix product of the same rounds. The row of a call that fails says why.
    """
    ceiling = {"copy": copy(size, device), "matmul": matmul(n, dtype, device)}
    ceiling = {name: timing.captured(step, device) for name, step in ceiling.items()}
    for call, count in sorted(calls.items(), key=lambda item: -item[1] * roofline.bytes_of(item[0])):
        row = {"name": describe(call), "calls": count, "ours": None, LIBRARY: None, "floor": None, "unit": "us"}
        try:
            made = argument_sets(call, device)
            steps = ceiling | {"ours": timing.captured(replay(call.op, made), device)}
            if function := library(call):
                with peers.cudnn():
                    steps["library"] = timing.captured(replay(function, made), device)
            times = timing.alternate(steps, device, rounds=rounds, repeat=5, warm_up=2)
        except Exception as error:
            if timing.lost(error):
                raise
            yield row | {"share": None, "note": timing.reason(error)}
            continue
        needed, flops = roofline.bytes_of(call), roofline.flops_of(call)
        per_call = {name: [ms / len(made) * 1e3 for ms in values] for name, values in times.items()}
        least = [ms * 1e3 for ms in floor(needed, flops, times, size=size, n=n)]
        share = median(a / b for a, b in zip(least, per_call["ours"], strict=True))
        ours = timing.significant(median(per_call["ours"]))
        row |= {"ours": ours, "floor": timing.significant(median(least))}
        if function:
            row[LIBRARY] = timing.significant(median(per_call["library"]))
        yield row | {"share": timing.significant(share), "note": rates(needed, flops, ours)}


def amp_unscale(arena: Arena) -> timing.Step:
    """Returns a step that does what a GradScaler does to the fp32 gradients of as many parameters.

    It makes the same check, and takes no norms.
    """
    gradients = [torch.randn_like(slot.parameter, dtype=torch.float32) for slot in arena.slots]
    found, inverse = torch.zeros(1, device=gradients[0].device), torch.ones(1, device=gradients[0].device)
    return partial(torch._amp_foreach_non_finite_check_and_unscale_, gradients, found, inverse)


def in_turn(steps: list[timing.Step]) -> timing.Step:
    def step() -> None:
        for one in steps:
            one()

    return step


def measure_ops(model: str, device: torch.device, dtype: torch.dtype, *, size: int, rounds: int) -> Rows:
    """Returns rows of each op, timed over ARENAS arenas in turn, between copies of `size` bytes.

    Raises RuntimeError if a step was skipped.
    """
    optimizers = [optimizer(model, device, dtype) for _ in range(ARENAS)]
    for larc in optimizers:
        larc.step()
    steps = {"copy": timing.captured(copy(size, device), device)}
    for op in OPS:
        steps[op] = timing.captured(in_turn([launches(larc)[op] for larc in optimizers]), device)
    unscale = "_amp_foreach_non_finite_check_and_unscale_"
    steps[unscale] = timing.captured(in_turn([amp_unscale(larc.arena) for larc in optimizers]), device)
    times = timing.alternate(steps, device, rounds=rounds, repeat=5, warm_up=3)
    if any(larc.scalars[2] != 1 for larc in optimizers):
        raise RuntimeError("the measured step was skipped as an overflow: its time says nothing")

    per_op = {name: [ms / ARENAS for ms in values] for name, values in times.items()}
    head = f"{model}, {str(dtype).removeprefix('torch.')}:"
    rows = []
    for op, needed in bytes_of(optimizers[0].arena).items():
        row = timing.row(f"{head} {op} / floor", "us", per_op[op], floor(needed, 0, times, size=size, n=0))
        rows.append(row | {"note": rates(needed, 0, row["ours"])})
    statistics, ratio = per_op["gradient_statistics"], timing.significant(median(per_op["trust_ratio"]) * 1e3)
    rows.append(timing.missing(f"{head} trust_ratio", "us", "8 bytes a block, out of the cache") | {"ours": ratio})
    rows.append(timing.row(f"{head} gradient_statistics / {unscale}", "us", statistics, per_op[unscale]))
    return rows


def measure_steps(
    ours: dict[str, Callable[[], timing.Step]],
    peers: dict[str, Callable[[], timing.Step]],
    device: torch.device,
    *,
    rounds: int,
    repeat: int,
) -> Rows:
    """Returns rows of whole optimizer steps, all contenders in each round. The row of a peer that fails says why."""
    failed: Rows = []
    steps = {name: make() for name, make in ours.items()}
    for name, make in peers.items():
        try:
            step = make()
            step()
            steps[name] = step
        except Exception as error:  # whatever a peer raises is its result
            failed.append(timing.missing(f"optimizer step: {' and '.join(ours)} / {name}", "us", error))
    times = timing.alternate(steps, device, rounds=rounds, repeat=repeat, warm_up=3)
    pairs = [(our, peer) for our in ours for peer in peers if peer in times]
    return [timing.row(f"optimizer step: {a} / {b}", "us", times[a], times[b]) for a, b in pairs] + failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("which", nargs="?", choices=("optimizer", "layers"), help="default: both, on a CPU the first")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no layer later (no limit)")
    arguments = parser.parse_args()
    start = time.monotonic()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: no GPU here")
    gpu = torch.cuda.is_available()
    if arguments.which == "layers" and not gpu:
        parser.error("layers: no GPU here, and references are not made for one pass")
    device = torch.device("cuda" if gpu else "cpu")
    size, n, rounds = (1 << 30, 8192, 20) if gpu else (1 << 28, 1024, 9)
    dtypes = (torch.float16, torch.bfloat16) if gpu else (torch.float32, torch.bfloat16)
    tables: list[Rows] = []

    def add(more: Iterable[dict[str, Any]]) -> None:
        for row in more:
            tables[-1].append(row)
            if arguments.json:
                report.write(arguments.json, "ops", [row for rows in tables for row in rows])
            if time.monotonic() - start > arguments.seconds:
                print(f"{arguments.seconds:.0f} s are over: what follows is left out")
                return

    if arguments.which != "layers":
        from benchmarks.bench_larc_update import OURS, PEERS  # it asks for the device as it is imported

        tables.append([])
        add(ceilings(device, dtypes, size=size, n=n, rounds=rounds))
        add(measure_ops("resnet50", device, dtypes[0], size=size, rounds=rounds))
        add(measure_steps(OURS, PEERS, device, rounds=rounds, repeat=20 if gpu else 1))
    if gpu and arguments.which != "optimizer":
        tables.append([])
        calls = layer_calls("resnet50", 256, dtypes[0], *CONVS, mixed=True)
        with quick_captures():
            add(measure_layers(calls, device, dtypes[0], size=size, n=n, rounds=5))
    print(*(report.table(timing.shown(rows)) for rows in tables), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
