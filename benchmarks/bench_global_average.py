"""Times the mean over H and W before ResNet-50's classifier against PyTorch's."""

import torch
from torch import Tensor, nn

import kernels
from benchmarks.layers import Layer, comparison, images, modules


class Ours(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.global_average(x)


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def activations(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
    return (images(2048, 7, 7, device, dtype),)


LAYERS = [Layer("global_average 2048 x 7 x 7", activations, modules(Ours, Plain))]
test_global_average = comparison(LAYERS)
