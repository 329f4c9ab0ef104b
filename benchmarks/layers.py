"""Compares layers as nvcnn has them and as others write them, on the shapes of ResNet-50: those of bench_*.py.

python -m benchmarks.layers [--json FILE] [NAME ...]    runs layers whose name contains a NAME, or all

`pytest benchmarks/ --benchmark-only` times each contender on its own, grouped by layer, and `--benchmark-compare` sets
two runs side by side. Here contenders take turns. On a GPU, in fp16 at batch 256, they run as CUDA graphs over several
sets of inputs that together exceed the L2 cache, next to torch.compile and to the floor of nvcnn's own ops, that of
`benchmarks.ops`; on a CPU, in fp32 at batch 2, the references run.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import ops, peers, report, timing
from nvcnn.models import build_model
from nvcnn.models.layers import BatchNorm2d
from nvcnn.roofline import META, bytes_of, flops_of, recorded

COPY, MATMUL = 1 << 30, 8192
OURS = "nvcnn"

Inputs = tuple[Tensor, ...]
Contender = Callable[..., tuple[Tensor, ...]]  # (*inputs, backward) -> outputs, and the gradients if `backward`


@dataclass(frozen=True)
class Layer:
    """Describes one op at one shape. The `contenders`, among them OURS, make what is timed.

    `phases` are the values of `backward` that are timed. `work` says what a phase computes, where that is not just
    forward, or forward and backward.
    """

    name: str
    inputs: Callable[[torch.device, torch.dtype], Inputs]
    contenders: Mapping[str, Callable[[torch.device], Contender]]
    phases: tuple[bool, ...] = (False, True)
    work: str = ""

    def title(self, backward: bool) -> str:
        return f"{self.name}, {self.work or ('forward and backward' if backward else 'forward')}"


def device_and_batch() -> tuple[torch.device, torch.dtype, int]:
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.float16, 256
    return torch.device("cpu"), torch.float32, 2


def images(c: int, h: int, w: int, device: torch.device, dtype: torch.dtype, *, batch: int | None = None) -> Tensor:
    """Returns random activations, (batch, c, h, w), channels-last, that require a gradient."""
    x = torch.randn(batch or device_and_batch()[2], c, h, w, device=device)
    return x.to(dtype, memory_format=torch.channels_last).requires_grad_()


def differentiated(make: Callable[[], nn.Module], device: torch.device, *, compiled: bool = False) -> Contender:
    """Returns a contender that computes a module's forward, and its gradients for a random gradient of its output.

    The gradients are those of its parameters and of the inputs that require one.
    """
    module = make().to(device).train()
    function = torch.compile(module, mode="max-autotune-no-cudagraphs", dynamic=False) if compiled else module
    directions: dict[torch.Size, Tensor] = {}

    def run(*inputs: Tensor, backward: bool) -> tuple[Tensor, ...]:
        with peers.cudnn():
            y = function(*inputs)
            if not backward:
                return (y,)
            if y.shape not in directions:
                directions[y.shape] = torch.randn_like(y)
            leaves = [*(x for x in inputs if x.requires_grad), *module.parameters()]
            return y, *torch.autograd.grad(y, leaves, directions[y.shape])

    return run


def modules(ours: Callable[[], nn.Module], plain: Callable[[], nn.Module]) -> Mapping[str, Callable[..., Contender]]:
    """Returns as contenders ours, PyTorch's operators, and on a GPU these compiled, by name."""
    contenders = {OURS: partial(differentiated, ours), "PyTorch": partial(differentiated, plain)}
    if torch.cuda.is_available():
        contenders["torch.compile"] = partial(differentiated, plain, compiled=True)
    return contenders


@cache
def batch_norms() -> dict[str, tuple[int, int, bool, bool]]:
    """Returns C, H (= W), with residual and with ReLU of ResNet-50's distinct BatchNorms, by name.

    Equal ones have the name of the first in the network.
    """
    model = build_model("resnet50", num_classes=1000, seed=0).to(META)
    found: dict[tuple[int, int, bool, bool], str] = {}

    def note(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        c, h = args[0].shape[1:3]
        found.setdefault((c, h, kwargs.get("residual") is not None, kwargs.get("relu", False)), name)

    for name, module in model.named_modules():
        if isinstance(module, BatchNorm2d):
            module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
    with recorded():
        model(torch.empty(1, 3, 224, 224, device=META).to(memory_format=torch.channels_last))
    return {name: shape for shape, name in found.items()}


def inputs_in_turn(layer: Layer, device: torch.device, dtype: torch.dtype) -> list[Inputs]:
    """Returns so many sets of inputs that they exceed the cache; on a CPU one."""
    first = layer.inputs(device, dtype)
    more = timing.sets(sum(x.nbytes for x in first), device) - 1
    return [first, *(layer.inputs(device, dtype) for _ in range(more))]


def step_of(contender: Contender, sets: list[Inputs], backward: bool) -> timing.Step:
    def step() -> None:
        for inputs in sets:
            contender(*inputs, backward=backward)

    return step


def bytes_and_flops(layer: Layer, dtype: torch.dtype, backward: bool) -> tuple[int, int]:
    """Returns the bytes that our ops must move and the FLOPs that they must do, by the roofline."""
    contender = layer.contenders[OURS](META)
    inputs = layer.inputs(META, dtype)
    with recorded():
        contender(*inputs, backward=backward)  # makes the output's gradient, which is no part of the work
    with recorded() as calls:
        contender(*inputs, backward=backward)
    return sum(map(bytes_of, calls)), sum(map(flops_of, calls))


def compare(
    layer: Layer, backward: bool, *, copy: int = COPY, n: int = MATMUL, rounds: int = 10
) -> list[dict[str, Any]]:
    """Returns a row against each other contender, and on a GPU one against the floor.

    The row of a contender that fails says why.
    """
    device, dtype, _ = device_and_batch()
    sets = inputs_in_turn(layer, device, dtype)
    title, rows = layer.title(backward), []
    steps: dict[str, timing.Step] = {}
    for name, make in layer.contenders.items():
        try:
            step = timing.captured(step_of(make(device), sets, backward), device)
            step()
            steps[name] = step
        except Exception as error:  # whatever a peer raises is its result
            if name == OURS:
                raise
            rows.append(timing.missing(f"{title} / {name}", "us", error))
    others = [name for name in steps if name != OURS]
    if device.type == "cuda":
        needed, flops = bytes_and_flops(layer, dtype, backward)
        steps["copy"] = ops.copy(copy, device)
        if flops:
            steps["matmul"] = ops.matmul(n, dtype, device)
    times = timing.alternate(steps, device, rounds=rounds, repeat=5 if device.type == "cuda" else 1, warm_up=2)
    per_set = {name: [ms / len(sets) for ms in times[name]] for name in (OURS, *others)}
    rows = [timing.row(f"{title} / {name}", "us", per_set[OURS], per_set[name]) for name in others] + rows
    if device.type == "cuda":
        least = ops.floor(needed, flops, times, size=copy, n=n)
        row = timing.row(f"{title} / floor", "us", per_set[OURS], least)
        rows.append(row | {"note": ops.rates(needed, flops, row["ours"])})
    return rows


def comparison(layers: list[Layer]) -> Callable[..., None]:
    """Returns the pytest-benchmark test of these layers, with a group for each layer and phase."""
    cases = [(layer, backward, name) for layer in layers for backward in layer.phases for name in layer.contenders]

    @pytest.mark.parametrize(("layer", "backward", "name"), cases, ids=[f"{a.title(b)}: {c}" for a, b, c in cases])
    def test(benchmark, layer, backward, name):
        device, dtype, _ = device_and_batch()
        sets = inputs_in_turn(layer, device, dtype)
        step = timing.captured(step_of(layer.contenders[name](device), sets, backward), device)
        benchmark.group = layer.title(backward)

        def timed() -> None:
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(timed, rounds=10, warmup_rounds=2)
        benchmark.extra_info["sets"] = len(sets)

    return test


def all_layers() -> Iterator[Layer]:
    for file in sorted(Path(__file__).parent.glob("bench_*.py")):
        yield from getattr(import_module(f"benchmarks.{file.stem}"), "LAYERS", [])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only layers whose name contains it")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args()
    layers = [layer for layer in all_layers() if any(name in layer.name for name in arguments.names or [""])]
    if not layers:
        parser.error(f"no layer's name contains {' or '.join(arguments.names)}")
    rows: list[dict[str, Any]] = []
    for layer in layers:
        for backward in layer.phases:
            rows += compare(layer, backward)
            if arguments.json:
                report.write(arguments.json, "layers", rows)
    print(report.table(timing.shown(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
