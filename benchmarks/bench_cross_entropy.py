"""Times loss, hits and scaled gradient of 1000 classes, all of which a step needs, against PyTorch's operators."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks.layers import OURS, Contender, Layer, comparison, device_and_batch

CLASSES, SMOOTHING = 1000, 0.1


def ours(device: torch.device) -> Contender:
    def run(logits: Tensor, labels: Tensor, loss_scale: Tensor, backward: bool) -> tuple[Tensor, ...]:
        rows, gradient = kernels.cross_entropy(logits, labels, loss_scale, SMOOTHING)
        return rows[:, 0].mean(), rows[:, 1:].mean(0), gradient

    return run


def plain(device: torch.device, *, compiled: bool = False) -> Contender:
    def forward(logits: Tensor, labels: Tensor, loss_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        found = logits.detach().topk(5, 1).indices == labels[:, None]
        return loss, loss * loss_scale, torch.stack((found[:, 0].float().mean(), found.any(1).float().mean()))

    function = torch.compile(forward, mode="max-autotune-no-cudagraphs", dynamic=False) if compiled else forward

    def run(logits: Tensor, labels: Tensor, loss_scale: Tensor, backward: bool) -> tuple[Tensor, ...]:
        loss, scaled, hits = function(logits, labels, loss_scale)
        return loss.detach(), hits, *torch.autograd.grad(scaled, logits)

    return run


def logits_and_labels(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    batch = device_and_batch()[2]
    logits = torch.randn(batch, CLASSES, device=device).requires_grad_()
    return logits, torch.arange(batch, device=device) * 7 % CLASSES, torch.full((1,), 128.0, device=device)


CONTENDERS: dict[str, Callable[[torch.device], Contender]] = {OURS: ours, "PyTorch": plain}
if torch.cuda.is_available():
    CONTENDERS["torch.compile"] = lambda device: plain(device, compiled=True)
LAYERS = [Layer("cross_entropy 1000", logits_and_labels, CONTENDERS, phases=(True,))]
test_cross_entropy = comparison(LAYERS)
