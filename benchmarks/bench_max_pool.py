"""Times the max pooling of ResNet-50's stem, 3 x 3 with stride 2, against PyTorch's.

PyTorch's keeps 8 bytes for each maximum, ours 1.
"""

import torch
from torch import Tensor, nn

import kernels
from benchmarks.layers import Layer, comparison, images, modules


class Ours(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.max_pool(x, 3, stride=2, padding=1)


def activations(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
    return (images(64, 112, 112, device, dtype),)


LAYERS = [Layer("max_pool 64 x 112 x 112", activations, modules(Ours, lambda: nn.MaxPool2d(3, 2, 1)))]
test_max_pool = comparison(LAYERS)
