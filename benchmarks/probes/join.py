"""Is a forward join of 256 to 64 channels near its floor in Triton, or does it want Gluon?

    z = relu(x scale + (r + shift)) in halves, stored;   y = z W^T, with sums of d and d^2 as in `resident_forward`
All of y's channels fit one program, so that x and r are read, and z is formed, once. x, r, z and y are moved once, 1336
MB at 56 x 56. If the kernel takes more than 1.25 times the floor of these bytes, a Gluon kernel is worth writing.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.probes import IMAGES, Contender, Probe, divides, errors, images, normal, small_rows
from benchmarks.probes.halves import column_sums, deviation, fma_relu, normalised, one_row, random_norm
from benchmarks.probes.present import POINTWISE, library, norm, present

C, K, SIZE = 256, 64, 56
BLOCK_ROWS, BLOCK_IN = 128, 64
OURS = "Triton, halves"
FLOOR = 2 * IMAGES * SIZE * SIZE * (3 * C + K) / 3.0e12 * 1e6  # us on a H100


@triton.jit(do_not_specialize=["parts"])
def join(
    x,
    residual,
    weight,
    x_norm,
    y_norm,
    z,
    y,
    sums,
    parts,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One program computes whole rows of z and y."""
    part = tl.program_id(0)
    row, k = tl.arange(0, BLOCK_ROWS), tl.arange(0, K)
    first = part.to(tl.int64) * BLOCK_ROWS
    result = tl.zeros((K, BLOCK_ROWS), tl.float32)
    for step in range(C // BLOCK_IN):
        # Prologue: the join is written as it is formed.
        c = step * BLOCK_IN + tl.arange(0, BLOCK_IN)
        at = first * C + (row[:, None] * C + c[None, :])
        scale, shift = tl.load(x_norm + c)[None, :], tl.load(x_norm + C + c)[None, :]
        a = fma_relu(tl.load(x + at), scale, tl.load(residual + at) + shift)
        tl.store(z + at, a)
        # Product: a is the right operand, which comes from shared memory, so that it is formed in one layout alone.
        w = tl.load(weight + (k[:, None] * C + c[None, :]))
        result = tl.dot(w, tl.trans(a), result)
    # Epilogue.
    out = tl.trans(result).to(tl.float16)
    tl.store(y + first * K + (row[:, None] * K + k[None, :]), out)
    d = deviation(out, tl.load(y_norm + k)[None, :], tl.load(y_norm + K + k)[None, :])
    zero = tl.zeros((16, K), tl.float32)
    tl.store(sums + part * K + k, one_row(column_sums(d, zero)))
    tl.store(sums + (parts + part) * K + k, one_row(column_sums(d * d, zero)))


def launch(
    x: Tensor, residual: Tensor, weight: Tensor, x_norm: Tensor, y_norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns z, (rows, C), y, (rows, K), and sums, (2, parts, K), fp32.

    x, residual: (rows, C). weight: (K, C). x_norm, y_norm: (2, C) and (2, K), halves.
    """
    rows = x.shape[0]
    parts = divides(BLOCK_ROWS, rows)
    z, y = torch.empty_like(x), x.new_empty(rows, K)
    sums = torch.empty(2, parts, K, device=x.device)
    constants = {"C": C, "K": K, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_IN": BLOCK_IN}
    join[(parts,)](
        *(x, residual, weight, x_norm, y_norm, z, y, sums, parts),
        **constants,
        num_warps=8,
        num_stages=3,
    )
    return z, y, sums


def operands(rows: int, device: torch.device) -> tuple[Tensor, ...]:
    """Returns the operands of `launch`."""
    x, residual = (normal(rows, C, device=device) for _ in range(2))
    weight = normal(K, C, device=device, std=C**-0.5)
    return x, residual, weight, random_norm(C, device), random_norm(K, device)


def check(device: torch.device) -> dict[str, float]:
    x, residual, weight, x_norm, y_norm = operands(small_rows(device), device)
    z, y, sums = launch(x, residual, weight, x_norm, y_norm)
    scale, shift = x_norm
    joined = (x.double() * scale.double() + (residual + shift).double()).relu().half().double()
    d = normalised(y, y_norm).double()
    total, squares = sums.sum(1)
    true_y = joined @ weight.double().T
    return errors(z=(z, joined), y=(y, true_y), sum=(total, d.sum(0)), squares=(squares, d.square().sum(0)))


def contenders(device: torch.device) -> dict[str, Contender]:
    rows = IMAGES * SIZE * SIZE
    x, residual, weight, x_norm, y_norm = operands(rows, device)
    as_images = images(x, SIZE), weight[:, :, None, None]
    fused = {"norm": norm(C, device), "residual": images(residual, SIZE), "center": torch.zeros(K, device=device)}
    needed, flops = 2 * rows * (3 * C + K), 2 * rows * C * K
    return {
        OURS: Contender(partial(launch, x, residual, weight, x_norm, y_norm), needed, flops),
        "present": Contender(partial(present("convolution"), *as_images, *POINTWISE, **fused), needed, flops),
        "cuDNN, convolution alone": Contender(library(*as_images, POINTWISE), 2 * rows * (C + K), flops),
    }


def verdict(us: dict[str, float], factor: float) -> str:
    ratio = us[OURS] * factor / FLOOR
    return f"{'Triton suffices' if ratio <= 1.25 else 'write it in Gluon'}: {ratio:.2f} times the floor"


PROBE = Probe(
    name="join",
    question="forward join 1 x 1, 256 to 64 channels at 56 x 56, in halves: near the floor?",
    threshold="up to 1.25 times the floor it is",
    seconds=6,
    tolerance=2e-3,
    check=check,
    contenders=contenders,
    verdict=verdict,
)
