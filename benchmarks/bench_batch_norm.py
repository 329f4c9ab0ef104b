"""Times BatchNorm in training, with the addition and ReLU that follow it, against PyTorch's (cuDNN's on a GPU)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.layers import Layer, batch_norms, comparison, images, modules
from nvcnn.models.layers import BatchNorm2d


class Ours(nn.Module):
    def __init__(self, channels: int, relu: bool):
        super().__init__()
        self.norm, self.relu = BatchNorm2d(channels), relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.norm(x, residual=residual, relu=self.relu)


class Plain(nn.Module):
    def __init__(self, channels: int, relu: bool):
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(channels, eps=1e-4), relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if residual is not None:
            y = y + residual
        return F.relu(y, inplace=True) if self.relu else y


def activations(c: int, h: int, residual: bool, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(images(c, h, h, device, dtype) for _ in range(1 + residual))


LAYERS = [
    Layer(
        f"batch_norm {name} {c} x {h} x {h}{' add' if residual else ''}{' relu' if relu else ''}",
        partial(activations, c, h, residual),
        modules(partial(Ours, c, relu), partial(Plain, c, relu)),
    )
    for name, (c, h, residual, relu) in batch_norms().items()
]
test_batch_norm = comparison(LAYERS)
