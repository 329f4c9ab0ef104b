"""Computes the data gradient of a 1 x 1 convolution as two probes launch it, its operands, and what it must be.

    dy = scale g + (slope y + offset), rounded;   dx = dy W where a > 0;   a = relu(x scale + shift) in halves
The sums are those of dx and of dx d over the rows, where d = (x - mean) / deviation in halves. The product dx d is
taken in fp32.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.probes import divides, images, normal
from benchmarks.probes.halves import fma, fma_relu, normalised, random_norm, where_positive
from benchmarks.probes.present import POINTWISE, norm
from kernels.tiles import multiply_add


@dataclass(frozen=True)
class Operands:
    """Holds the operands of a data gradient, which are fp16 except for the factors.

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


def reference(of: Operands) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dw, sums, (2, C), and dy, in float64 except for what a kernel must round: a, d and dy."""
    scale, slope, offset = of.factors.double()
    dy = (of.g.double() * scale + (of.y.double() * slope + offset)).half().double()
    a = normalised(of.x, of.x_norm).relu().double()
    dx = torch.where(a > 0, dy @ of.weight.double(), 0.0)
    d = normalised(of.x, of.d_norm).double()
    return dx, dy.T @ a, torch.stack((dx.sum(0), (dx * d).sum(0))), dy


@triton.jit
def store_masked(result, x, x_norm, d_norm, dx, sums, part, parts, c, C: tl.constexpr):
    """Ends a tile of rows: applies the mask, and stores dx and the sums of dx as it is stored.

    Values are laid out as x is loaded: a thread has columns side by side of several rows, so that sums take few
    shuffles.
    """
    row = tl.arange(0, result.shape[0])
    at = part.to(tl.int64) * result.shape[0] * C + (row[:, None] * C + c[None, :])
    raw = tl.load(x + at)
    a = fma_relu(raw, tl.load(x_norm + c)[None, :], tl.load(x_norm + C + c)[None, :])
    out = where_positive(result.to(tl.float16), a)
    tl.store(dx + at, out)
    d = fma(raw, tl.load(d_norm + c)[None, :], tl.load(d_norm + C + c)[None, :])
    out = out.to(tl.float32)
    tl.store(sums + part * C + c, tl.sum(out, 0))
    # The product is in fp32, since a third of the products would be subnormal halves at a loss scale of 128.
    tl.store(sums + (parts + part) * C + c, tl.sum(out * d.to(tl.float32), 0))


@triton.jit(do_not_specialize=["parts"])
def data_gradient(
    g,
    y,
    weight,
    factors,
    x,
    x_norm,
    d_norm,
    dx,
    dy,
    sums,
    parts,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One program computes BLOCK_ROWS x BLOCK_OUT of dx.

    Where dy is asked for, the program of the first column block of a row tile stores it.
    """
    blocks: tl.constexpr = C // BLOCK_OUT
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    row, c = tl.arange(0, BLOCK_ROWS), block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    first = part.to(tl.int64) * BLOCK_ROWS * K
    if dy is None:
        result = tl.zeros((BLOCK_ROWS, BLOCK_OUT), tl.float32)
    else:
        result = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    for step in range(K // BLOCK_IN):
        # Prologue: g goes through BatchNorm in fp32, and is rounded once at the end.
        k = step * BLOCK_IN + tl.arange(0, BLOCK_IN)
        at = first + (row[:, None] * K + k[None, :])
        slope, offset = tl.load(factors + K + k)[None, :], tl.load(factors + 2 * K + k)[None, :]
        map_y = tl.load(y + at).to(tl.float32) * slope + offset
        gradient = (tl.load(g + at).to(tl.float32) * tl.load(factors + k)[None, :] + map_y).to(tl.float16)
        # Product.
        w = tl.load(weight + (k[:, None] * C + c[None, :]))
        if dy is None:
            result = multiply_add(gradient, w, result, True)
        else:
            tl.store(dy + at, gradient, mask=block == 0)
            result = tl.dot(tl.trans(w), tl.trans(gradient), result)
    if dy is not None:
        result = tl.trans(result)
    store_masked(result, x, x_norm, d_norm, dx, sums, part, parts, c, C)


def launch(
    of: Operands, block_out: int, block_in: int, *, store: bool = False, **options: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns dx, (rows, C), sums, (2, parts, C), fp32, and dy, (rows, K), which is None unless `store`."""
    rows, k, c = of.sizes
    parts = divides(128, rows)
    dx, sums = of.x.new_empty(rows, c), torch.empty(2, parts, c, device=of.x.device)
    dy = torch.empty_like(of.g) if store else None
    constants = {"K": k, "C": c, "BLOCK_ROWS": 128, "BLOCK_OUT": block_out, "BLOCK_IN": block_in}
    data_gradient[(parts * divides(block_out, c),)](
        *(of.g, of.y, of.weight, of.factors, of.x, of.x_norm, of.d_norm, dx, dy, sums, parts),
        **constants,
        num_warps=8,
        num_stages=3,
        **options,
    )
    return dx, sums, dy
