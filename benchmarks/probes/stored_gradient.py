"""Should the data gradient store dy as it forms it, so that the weight gradient need not form it again?

    dy = scale g + (slope y + offset), rounded;   dw = dy^T a,   a = relu(x scale + shift) in halves
It costs one write of dy, and saves a read of y and the map, which is most of the weight gradient's instructions. The
probe times a layer's two gradients for 1 x 1, 1024 to 256 channels at 14 x 14. dw has the same bits either way. dy
should be stored if that saves 25 us on a H100.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.probes import IMAGES, Contender, Probe, divides, errors, processors, small_rows
from benchmarks.probes.data_gradient import Operands, launch, operands, reference
from benchmarks.probes.halves import fma_relu
from benchmarks.probes.present import POINTWISE, library_gradients, present, summed

K, C, SIZE = 1024, 256, 14
BLOCK_ROWS, BLOCK_OUT, BLOCK_IN = 64, 128, 128
STORED, TWICE = "dy stored", "dy formed twice"


@triton.jit(do_not_specialize=["tiles_a_part", "tiles"])
def weight_gradient(
    g_tiles,
    y_tiles,
    x_tiles,
    factors,
    x_norm,
    dw,
    tiles,
    tiles_a_part,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One program computes BLOCK_OUT x BLOCK_IN of one part's dw. Without y_tiles, g is dy.

    Tiles past the end are read as 0.
    """
    columns: tl.constexpr = C // BLOCK_IN
    blocks: tl.constexpr = K // BLOCK_OUT * columns
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    k0, c0 = block // columns * BLOCK_OUT, block % columns * BLOCK_IN
    k, c = k0 + tl.arange(0, BLOCK_OUT), c0 + tl.arange(0, BLOCK_IN)
    scale, shift = tl.load(x_norm + c)[None, :], tl.load(x_norm + C + c)[None, :]
    result = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    first = part * tiles_a_part
    for step in range(tl.maximum(tl.minimum(tiles_a_part, tiles - first), 1)):
        row = (first + step) * BLOCK_ROWS
        # Prologue: both operands are formed.
        dy = g_tiles.load([row, k0])
        if y_tiles is not None:
            slope, offset = tl.load(factors + K + k)[None, :], tl.load(factors + 2 * K + k)[None, :]
            map_y = y_tiles.load([row, k0]).to(tl.float32) * slope + offset
            dy = (dy.to(tl.float32) * tl.load(factors + k)[None, :] + map_y).to(tl.float16)
        a = fma_relu(x_tiles.load([row, c0]), scale, shift)
        # Product.
        result = tl.dot(tl.trans(dy), a, result)
    tl.store(dw + part.to(tl.int64) * (K * C) + (k[:, None] * C + c[None, :]), result)


def launch_weight(of: Operands, dy: Tensor | None) -> Tensor:
    """Returns dw, (K, C), fp32, from dy if it is there, else from g and y."""
    rows, k, c = of.sizes
    tiles, blocks = divides(BLOCK_ROWS, rows), divides(BLOCK_OUT, k) * divides(BLOCK_IN, c)
    tiles_a_part = triton.cdiv(tiles, max(1, processors(of.g.device) // blocks))
    parts = triton.cdiv(tiles, tiles_a_part)
    partial_dw = torch.empty(parts, k, c, device=of.g.device)

    def of_rows(matrix: Tensor, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(matrix, [BLOCK_ROWS, columns])

    weight_gradient[(blocks * parts,)](
        of_rows(of.g if dy is None else dy, BLOCK_OUT),
        of_rows(of.y, BLOCK_OUT) if dy is None else None,
        *(of_rows(of.x, BLOCK_IN), of.factors, of.x_norm, partial_dw, tiles, tiles_a_part),
        K=k,
        C=c,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_OUT=BLOCK_OUT,
        BLOCK_IN=BLOCK_IN,
        num_warps=8,
        num_stages=3,
    )
    return summed(partial_dw)


def gradients(of: Operands, store: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns dx, dw, and dy, which is None unless `store`."""
    dx, _, dy = launch(of, 128, 32, store=store, maxnreg=128)
    return dx, launch_weight(of, dy), dy


def check(device: torch.device) -> dict[str, float]:
    of = operands(small_rows(device), K, C, device)
    true_dx, true_dw, _, true_dy = reference(of)
    (dx, dw, dy), (_, again, _) = gradients(of, True), gradients(of, False)
    assert dy is not None
    found = errors(dy=(dy, true_dy), dx=(dx, true_dx), dw=(dw, true_dw))
    return found | {"dw's bits": 0.0 if dw.equal(again) else float("inf")}


def contenders(device: torch.device) -> dict[str, Contender]:
    rows = IMAGES * SIZE * SIZE
    of = operands(rows, K, C, device)
    images, of_weight = of.present(SIZE), of.present_weight(SIZE)

    def both() -> None:
        present("convolution_data_gradient")(**images)
        present("convolution_weight_gradient")(**of_weight)

    library = library_gradients(images["g"], images["x"], images["weight"], POINTWISE, of_x=True, of_weight=True)
    fused, flops = 2 * rows * (4 * K + 3 * C), 4 * rows * K * C  # dy is written and read, or y is read twice
    return {
        STORED: Contender(partial(gradients, of, True), fused, flops),
        TWICE: Contender(partial(gradients, of, False), fused, flops),
        "present": Contender(both, fused, flops),
        "cuDNN, gradients alone": Contender(library, 2 * rows * (2 * K + 2 * C), flops),
    }


def verdict(us: dict[str, float], factor: float) -> str:
    saved = (us[TWICE] - us[STORED]) * factor
    return f"{'store dy' if saved >= 25 else 'form dy twice'}: storing saves {saved:.0f} us a layer"


PROBE = Probe(
    name="stored_gradient",
    question="data and weight gradient 1 x 1, 1024 to 256 channels at 14 x 14: store dy between them?",
    threshold="from 25 us saved, yes",
    seconds=6,
    tolerance=2e-3,
    check=check,
    contenders=contenders,
    verdict=verdict,
)
