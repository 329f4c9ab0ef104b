"""Compares every model with an independent implementation: logits, loss and all gradients, from the same weights.

python -m benchmarks.parity [MODEL ...] [--json FILE]

The peers are torchvision's models, timm's where torchvision has none, else a plain build of PyTorch's modules. Weights
and BatchNorm's statistics are random, images small, dropout is off, and auxiliary heads are on. Convolutions are
computed by all of --conv in turn, which on a CPU are the references of the kernels. The differences, relative to the
norm, are those from the peer in float64, the larger of training and evaluation: of the logits (with those of heads), of
the loss, and of the gradient that differs most; in float64, in fp32, and of the peer itself in fp32. Parameters and
multiplications of a forward pass are those of 1 000 classes at the model's own image size, without heads.
"""

import argparse
import sys
from itertools import cycle
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report
from benchmarks.peers import peer
from nvcnn.models import ALGORITHMS, MODELS, ORIGINS, build_model
from nvcnn.models.layers import Conv2d, outputs

CLASSES = 10
# Height and width that are compared, where these are not the least that a model takes: so that there are several pixels
# left for the last BatchNorm, without which roundings are magnified, or the auxiliary head finds its input.
SIZES = {"alexnet": 95, "googlenet": 64, "inception3": 299, "inception4": 139, "inception-resnet2": 139}
SIZES |= {name: 64 for name in MODELS if name.startswith("res")}


def randomize(model: nn.Module) -> None:
    """Draws weights that keep activations of one size from layer to layer, and BatchNorms that are not 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.1, 0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            module.momentum = 0.0  # in ours the running statistics wait for the optimizer


def pair(name: str) -> tuple[nn.Module, nn.Module, str]:
    """Returns ours and theirs with the same weights, in float64, and who they are."""
    torch.manual_seed(0)
    aux = "aux" in MODELS[name].flags
    theirs, who = peer(name, CLASSES, aux)
    randomize(theirs.double())
    published = ORIGINS.get(who, {}).get(name)
    epsilons = [module.eps for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)]
    # The table's epsilon must be the peer's.
    options: dict[str, Any] = published.options if published else {"epsilon": epsilons[0]} if epsilons else {}
    ours = build_model(name, num_classes=CLASSES, seed=1, aux=aux, **options).double()
    values = theirs.state_dict().values()  # a plain build has other names
    ours.load_state_dict(theirs.state_dict() if published else dict(zip(ours.state_dict(), values, strict=True)))
    for conv, algorithm in zip((m for m in ours.modules() if isinstance(m, Conv2d)), cycle(ALGORITHMS), strict=False):
        conv.algorithm = algorithm
    ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return ours, theirs, who


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)).item()


def results(model: nn.Module, x: Tensor, training: bool) -> list[Tensor]:
    """Returns the logits, those of heads among them, the loss, and each gradient, which is 0 where there is none."""
    model.train(training).zero_grad()
    logits = outputs(model(x))
    loss = torch.stack([F.cross_entropy(y, torch.arange(len(x)) % CLASSES) for y in logits]).sum()
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [torch.cat([y.flatten() for y in logits]), loss, *gradients]


def differences(found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Returns those of logits and loss, and the largest of gradients, but of those that are 0 but for roundings."""
    pairs = list(zip(found, expected, strict=True))
    gradients = [distance(a, b) for a, b in pairs[2:] if b.norm() > 1e-6 * expected[1]]
    return {"logits": distance(*pairs[0]), "loss": distance(*pairs[1]), "gradient": max(gradients)}


def row(name: str) -> dict[str, Any]:
    """Returns what the table says of one model."""
    ours, theirs, who = pair(name)
    size = SIZES.get(name) or MODELS[name].least_size or MODELS[name].image_size
    x = torch.randn(4, 3, size, size, dtype=torch.float64).to(memory_format=torch.channels_last)
    columns: dict[str, Any] = {"model": name, "reference": who}
    with torch.device("meta"):
        whole = build_model(name, num_classes=1000, seed=1).eval()
        images = torch.empty(1, 3, MODELS[name].image_size, MODELS[name].image_size)
        with FlopCounterMode(display=False) as counter:
            whole(images.to(memory_format=torch.channels_last))
    columns["parameters"] = sum(p.numel() for p in whole.parameters())
    columns["GMACs"] = round(counter.get_total_flops() / 2e9, 3)
    columns["size"] = size
    with mock.patch.object(F, "dropout", lambda x, *_, **__: x):
        exact = {training: results(theirs, x, training) for training in (True, False)}
        contenders = {
            "float64": (ours, torch.float64),
            "fp32": (ours, torch.float32),
            "peer's": (theirs, torch.float32),
        }
        for words, (model, dtype) in contenders.items():
            both = [differences(results(model.to(dtype), x.to(dtype), training), exact[training]) for training in exact]
            columns |= {f"{what}, {words}": max(found[what] for found in both) for what in both[0]}
    return columns


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="only these (all)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args()
    if unknown := set(arguments.models) - MODELS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    rows = [row(name) for name in arguments.models or MODELS]
    if arguments.json:
        report.write(arguments.json, "parity", rows)
    shown = [{k: f"{v:.1e}" if isinstance(v, float) and k != "GMACs" else v for k, v in row.items()} for row in rows]
    print(report.table(shown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
