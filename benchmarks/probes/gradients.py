"""Makes the operands of a 1 x 1 convolution's gradients, which two probes compute, and says what these must be.

    dy = scale g + (slope y + offset), rounded;   a = relu(x scale + shift) in halves
    dx = dy W where a > 0;   dw = dy^T a
The sums are those of dx and of dx d over the rows, where d = (x - mean) / deviation in halves. The product dx d is
taken in fp32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.probes import images, normal
from benchmarks.probes.halves import normalised, random_norm
from benchmarks.probes.present import POINTWISE, norm


@dataclass(frozen=True)
class Operands:
    """Holds the operands of the gradients, which are fp16 except for the factors.

    g, y: (rows, K). weight: (K, C). factors: (3, K), fp32: scale, slope and offset. x: (rows, C). x_norm, d_norm:
    (2, C), the scale and shift by which a and d are computed from x.
    """

    g: Tensor
    y: Tensor
    weight: Tensor
    factors: Tensor
    x: Tensor
    x_norm: Tensor
    d_norm: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Returns rows, K and C."""
        k, c = self.weight.shape
        return self.g.shape[0], k, c

    def present(self, size: int) -> dict[str, Any]:
        """Returns what the project's data gradient takes, by name, with pixels as images of size x size."""
        _, k, c = self.sizes
        device = self.g.device
        return {
            "g": images(self.g, size),
            "weight": self.weight[:, :, None, None],
            "size": (size, size),
            "stride": POINTWISE[0],
            "padding": POINTWISE[1],
            "y": images(self.y, size),
            "norm": norm(k, device),
            "factors": self.factors[1:].contiguous(),
            "x": images(self.x, size),
            "x_norm": norm(c, device),
        }

    def present_weight(self, size: int) -> dict[str, Any]:
        """Returns the same for the project's weight gradient."""
        common = self.present(size)
        out = torch.empty_like(common.pop("weight"), dtype=torch.float32)
        del common["size"]
        return common | {"out": out}


def operands(rows: int, k: int, c: int, device: torch.device) -> Operands:
    scale, slope, offset = torch.rand(k, device=device) + 0.5, *(torch.randn(2, k, device=device) * 0.1)
    return Operands(
        *(normal(rows, k, device=device), normal(rows, k, device=device), normal(k, c, device=device, std=k**-0.5)),
        torch.stack((scale, slope, offset)),
        *(normal(rows, c, device=device), random_norm(c, device), random_norm(c, device)),
    )


def reference(of: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dw and sums, (2, C), in float64 except for what a kernel must round: a, d and dy."""
    scale, slope, offset = of.factors.double()
    dy = (of.g.double() * scale + (of.y.double() * slope + offset)).half().double()
    a = normalised(of.x, of.x_norm).relu().double()
    dx = torch.where(a > 0, dy @ of.weight.double(), 0.0)
    d = normalised(of.x, of.d_norm).double()
    return dx, dy.T @ a, torch.stack((dx.sum(0), (dx * d).sum(0)))
