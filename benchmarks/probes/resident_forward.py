"""Does plain Triton suffice for a 1 x 1 convolution of 64 to 256 channels, with BatchNorm, ReLU and statistics?

    y = relu(x scale + shift) W^T,   sums of d and d^2 over the rows, d = (y - center) / deviation
The weight stays in shared memory, a program walks over tiles of rows, and the sums stay in its registers, as products
with ones, until its end. Against one program a tile this spares loads of the weight and three quarters of the sums.
x and y are moved once, which takes 171 us on a H100. If the kernel takes more than 230 us there, a Gluon kernel is
worth writing.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.probes import IMAGES, Contender, Probe, divides, errors, images, normal, processors, small_rows
from benchmarks.probes.halves import column_sums, deviation, fma_relu, normalised, one_row, random_norm
from benchmarks.probes.present import POINTWISE, library, norm, present
from benchmarks.timing import Step

C, K, SIZE = 64, 256, 56
BLOCK_OUT = 128  # 256 spill
TILES = (128, 64)  # rows; programs have 8 warps, one an SM, or 4, two an SM


@triton.jit(do_not_specialize=["tiles"])
def resident_forward(
    x,
    weight,
    x_norm,
    y_norm,
    y,
    sums,
    tiles,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """One program computes BLOCK_OUT channels of every n-th tile of rows, where n programs share a column block."""
    # The block of the weight, the norms and the sums stay.
    blocks: tl.constexpr = K // BLOCK_OUT
    block, program, programs = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.num_programs(0) // blocks
    row, c, k = tl.arange(0, BLOCK_ROWS), tl.arange(0, C), block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    w = tl.load(weight + (k[:, None] * C + c[None, :]))
    scale, shift = tl.load(x_norm + c)[None, :], tl.load(x_norm + C + c)[None, :]
    inverse, origin = tl.load(y_norm + k)[None, :], tl.load(y_norm + K + k)[None, :]
    total = tl.zeros((16, BLOCK_OUT), tl.float32)
    squares = tl.zeros((16, BLOCK_OUT), tl.float32)
    for turn in range(tl.cdiv(tiles - program, programs)):
        first = (program + turn * programs).to(tl.int64) * BLOCK_ROWS
        # Prologue and product.
        a = fma_relu(tl.load(x + first * C + (row[:, None] * C + c[None, :])), scale, shift)
        out = tl.dot(a, tl.trans(w)).to(tl.float16)
        # Epilogue: y is stored, and the sums are those of y as it is stored.
        tl.store(y + first * K + (row[:, None] * K + k[None, :]), out)
        d = deviation(out, inverse, origin)
        total = column_sums(d, total)
        squares = column_sums(d * d, squares)
    tl.store(sums + program * K + k, one_row(total))
    tl.store(sums + (programs + program) * K + k, one_row(squares))


def launch(x: Tensor, weight: Tensor, x_norm: Tensor, y_norm: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Returns y, like x but with K channels, and sums, (2, P, K), fp32.

    x: (N H W, C). weight: (K, C). x_norm, y_norm: (2, C) and (2, K), halves. rows: those of a tile.
    """
    tiles, blocks = divides(rows, x.shape[0]), K // BLOCK_OUT
    programs = min(tiles, processors(x.device) * 128 // rows // blocks)
    y = x.new_empty(x.shape[0], K)
    sums = torch.empty(2, programs, K, device=x.device)
    resident_forward[(programs * blocks,)](
        *(x, weight, x_norm, y_norm, y, sums, tiles),
        C=C,
        K=K,
        BLOCK_ROWS=rows,
        BLOCK_OUT=BLOCK_OUT,
        num_warps=rows // 16,
        num_stages=3,
    )
    return y, sums


def check(device: torch.device) -> dict[str, float]:
    x, weight = normal(small_rows(device), C, device=device), normal(K, C, device=device, std=C**-0.5)
    x_norm, y_norm = random_norm(C, device), random_norm(K, device)
    a = normalised(x, x_norm).relu()
    found: dict[str, float] = {}
    for rows in TILES:
        y, sums = launch(x, weight, x_norm, y_norm, rows)
        d = normalised(y, y_norm).double()
        total, squares = sums.sum(1)
        product = a.double() @ weight.double().T
        of_tile = errors(y=(y, product), sum=(total, d.sum(0)), squares=(squares, d.square().sum(0)))
        found |= {f"{name}, {rows} rows": value for name, value in of_tile.items()}
    return found


def contenders(device: torch.device) -> dict[str, Contender]:
    rows = IMAGES * SIZE * SIZE
    x, weight = normal(rows, C, device=device), normal(K, C, device=device, std=C**-0.5)
    halves = random_norm(C, device), random_norm(K, device)
    steps: dict[str, Step] = {f"{n} x {BLOCK_OUT}": partial(launch, x, weight, *halves, n) for n in TILES}
    x, weight = images(x, SIZE), weight[:, :, None, None]
    fused = {"norm": norm(C, device), "center": torch.zeros(K, device=device)}
    steps["present"] = partial(present("convolution"), x, weight, *POINTWISE, **fused)
    steps["cuDNN, convolution alone"] = library(x, weight)
    return {name: Contender(step, 2 * rows * (C + K), 2 * rows * C * K) for name, step in steps.items()}


def verdict(us: dict[str, float], factor: float) -> str:
    best = min(us[f"{rows} x {BLOCK_OUT}"] for rows in TILES)
    return "Triton suffices" if best * factor <= 230 else "write it in Gluon"


PROBE = Probe(
    name="resident_forward",
    question="1 x 1, 64 to 256 channels at 56 x 56, weight resident, statistics: does Triton suffice?",
    threshold="up to 230 us it does",
    seconds=5,
    tolerance=2e-3,
    check=check,
    contenders=contenders,
    verdict=verdict,
)
