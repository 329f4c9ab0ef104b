"""Times the Gram matrix of a bottleneck's narrow activation, with its sums, against PyTorch's product and sum.

PyTorch's (on a GPU cuBLAS's, in fp32) reads the activation twice; ours reads it once.
"""

import torch
from torch import Tensor, nn

import kernels
from benchmarks.layers import Layer, comparison, images, modules
from nvcnn.models.functions import product_in_single


class Ours(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.gram_matrix(x, (1, 1))[1]


class PyTorch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        product = product_in_single(x, x)
        return torch.cat((product, x.sum((0, 2, 3), dtype=product.dtype).unsqueeze(0)))


def layer(c: int, size: int) -> Layer:
    def activations(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
        return (images(c, size, size, device, dtype),)

    return Layer(f"gram_matrix {c} x {size} x {size}", activations, modules(Ours, PyTorch), phases=(False,))


LAYERS = [layer(c, size) for c, size in ((64, 56), (128, 28), (256, 14), (512, 7))]
test_gram_matrix = comparison(LAYERS)
