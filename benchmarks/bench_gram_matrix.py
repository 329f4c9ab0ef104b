"""Times the Gram matrix of a bottleneck's narrow activation, with its sums, against PyTorch's product and sum.

PyTorch's product of halves has halves (on a GPU fp32, from cuBLAS), and reads the activation twice; ours reads it once.
"""

import torch
from torch import Tensor, nn

import kernels
from benchmarks.layers import Layer, comparison, images, modules


class Ours(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.gram_matrix(x, (1, 1))[1]


class PyTorch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1).flatten(0, 2)
        product = (
            torch.mm(rows.T, rows, out_dtype=torch.float32) if x.is_cuda and x.dtype != torch.float32 else rows.T @ rows
        )
        return torch.cat((product, rows.sum(0, dtype=product.dtype, keepdim=True)))


def layer(c: int, size: int) -> Layer:
    def activations(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
        return (images(c, size, size, device, dtype),)

    return Layer(f"gram_matrix {c} x {size} x {size}", activations, modules(Ours, PyTorch), phases=(False,))


LAYERS = [layer(c, size) for c, size in ((64, 56), (128, 28), (256, 14), (512, 7))]
test_gram_matrix = comparison(LAYERS)
