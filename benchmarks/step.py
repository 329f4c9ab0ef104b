"""Times the whole training step on synthetic data (forward, backward, optimizer) against what others would write.

python -m benchmarks.step [--device=cpu|cuda] [--model MODEL] [--batch N] [--conv auto|triton|...] [--json FILE]

On a GPU it runs ResNet-50 at batch 256, 224 x 224, in fp16; other models likewise, at their own size and the batch of
BATCHES. On the CPU, to prove the script, it runs ResNet-18 at batch 4, 64 x 64, in fp32. The peers are plain
channels-last loops with SGD(fused=True), on a GPU with automatic mixed precision, GradScaler and, by the same rule as
ours, the fastest of cuDNN's deterministic algorithms. They get normalised fp32 images; ours starts from uint8, as from
a decoder, and has LARC. On a GPU ours runs with --conv=auto and as a CUDA graph; its other --conv, and ours without a
graph, are among the peers of ResNet-50. Nobody has auxiliary heads.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers, report, timing
from nvcnn.cuda_graph import why_not
from nvcnn.data.synthetic import SyntheticData
from nvcnn.distributed import connect
from nvcnn.kernel_choices import choose_algorithms
from nvcnn.machine import chosen_kernels, use_device, versions
from nvcnn.models import ALGORITHMS, MODELS, build_model
from nvcnn.optimizer.larc import MOMENTUM, WEIGHT_DECAY
from nvcnn.settings import CONV
from nvcnn.step import Step

LEARNING_RATE = 1e-3  # small: the batch is always the same, and no contender may diverge while it is timed


@dataclass(frozen=True)
class Case:
    device: torch.device
    model: str
    batch: int
    size: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"step, {self.model}, batch {self.batch}, {self.size} x {self.size}, {dtype}"


CPU = Case(torch.device("cpu"), "resnet18", 4, 64, torch.float32)
GPU = Case(torch.device("cuda"), "resnet50", 256, 224, torch.float16)
OTHERS = ("vgg16", "resnext50", "inception3")  # which `benchmarks.gpu models` measures
BATCHES = dict.fromkeys(MODELS, 128) | {"resnet50": 256, "alexnet": 1024}


def ours(case: Case, conv: str = "auto", cuda_graph: str = "off") -> timing.Step:
    """Returns the trainer's own step with --conv and --cuda_graph."""
    transport = connect("torch")
    if (device := use_device(transport)[0]).type != case.device.type:
        raise RuntimeError(f"the trainer runs on {device}, not on {case.device}")
    model = build_model(case.model, num_classes=1000, seed=1)
    choose_algorithms(model, conv, (case.batch, case.size), case.dtype, device, transport)
    step = Step(
        model,
        image_size=case.size,
        device=device,
        schedule=torch.tensor([LEARNING_RATE]),
        transport=transport,
        dtype=case.dtype,
        loss_scale="dynamic" if case.dtype == torch.float16 else 1.0,
        larc_eta=1e-3,
    )
    data = SyntheticData(
        batch_size=case.batch, image_size=case.size, num_classes=1000, images=case.batch, seed=0, device=device
    )
    if not why_not(cuda_graph, gpu=device.type == "cuda", kernels=chosen_kernels(), ranks=1, transport=transport.name):
        step.capture(case.batch)
    return lambda: step(next(data))


def plain_loop(
    model: nn.Module, *, device: torch.device, dtype: torch.dtype, compile_mode: str | None = None, **sgd: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a training step as PyTorch's documentation has it.

    The step takes images (fp32, channels-last) and labels, and returns the loss. A `dtype` other than fp32 means
    automatic mixed precision. `sgd` are options of torch.optim.SGD.
    """
    model = model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    options: dict[str, Any] = {"momentum": MOMENTUM, "nesterov": True, "weight_decay": WEIGHT_DECAY}
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, **options, **sgd)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels)

    forward = torch.compile(loss_of, mode=compile_mode) if compile_mode else loss_of

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = forward(images, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return step


def synthetic(case: Case, model: nn.Module, compile_mode: str | None = None) -> timing.Step:
    generator = torch.Generator(case.device).manual_seed(0)
    images = torch.randn(case.batch, 3, case.size, case.size, device=case.device, generator=generator)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (case.batch,), device=case.device, generator=generator)
    step = plain_loop(model, device=case.device, dtype=case.dtype, compile_mode=compile_mode, fused=True)

    def benchmarked() -> None:
        with peers.cudnn():
            step(images, labels)

    return benchmarked


def torchvision(case: Case, compile_mode: str | None = None) -> timing.Step:
    model, who = peers.peer(case.model)
    if who != "torchvision":
        raise LookupError(f"torchvision has no {case.model}")
    return synthetic(case, model, compile_mode)


def timm(case: Case) -> timing.Step:
    from timm import create_model

    return synthetic(case, create_model(peers.TIMM.get(case.model) or peers.TORCHVISION[case.model]))


PEERS: dict[str, Callable[[Case], timing.Step]] = {"torchvision": torchvision, "timm": timm}
OURS: dict[str, Callable[[Case], timing.Step]] = {
    f"nvcnn, --conv={conv}": partial(ours, conv=conv, cuda_graph="auto") for conv in ALGORITHMS
} | {"nvcnn, --cuda_graph=off": ours}
# It comes last, since on a GPU it tunes for minutes, and the rows of the others are written by then.
COMPILED = {"torchvision, max-autotune": lambda case: torchvision(case, "max-autotune")}


def compare(
    case: Case,
    others: dict[str, Callable[[Case], timing.Step]],
    *,
    conv: str = "auto",
    rounds: int,
    repeat: int,
    write: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Returns a row for every peer, each of which takes turns with ours. `write` gets all rows when one is added."""
    rows: list[dict[str, Any]] = []
    own = ours(case, conv, cuda_graph="auto")
    for peer, make in others.items():
        name = f"{case.name}: nvcnn / {peer}"
        write([*rows, timing.missing(name, "images/s", "the benchmark ended while this was measured")])
        try:
            steps = {"nvcnn": own, peer: make(case)}
            times = timing.alternate(steps, case.device, rounds=rounds, repeat=repeat, warm_up=5)
            package = peer.split(",")[0]
            note = f"{package} {versions().get(package) or metadata.version(package)}; both with {peers.CUDNN}"
            rows.append(timing.row(name, "images/s", times["nvcnn"], times[peer], images=case.batch, note=note))
        except Exception as error:  # whatever a peer raises is its result
            rows.append(timing.missing(name, "images/s", error))
        write(rows)
        steps = {}
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--model", choices=MODELS, help="default: resnet50, on a CPU resnet18")
    parser.add_argument("--conv", choices=CONV, default="auto", help="what computes convolutions of ours")
    parser.add_argument("--batch", type=int, help="images a step")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device=cuda: no GPU here")

    def write(rows: list[dict[str, Any]]) -> None:
        if arguments.json:
            report.write(arguments.json, "step", rows)

    gpu = torch.cuda.is_available()
    case = GPU if gpu else CPU
    if model := arguments.model:
        batch = BATCHES[model] if gpu else CPU.batch
        case = replace(case, model=model, batch=batch, size=MODELS[model].image_size)
    case = replace(case, batch=arguments.batch or case.batch)
    if gpu:
        others = PEERS if arguments.model else PEERS | OURS | COMPILED
        rows = compare(case, others, conv=arguments.conv, rounds=8, repeat=10, write=write)
    else:
        rows = compare(case, PEERS, conv=arguments.conv, rounds=9, repeat=3, write=write)
    print(report.table(timing.shown(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
