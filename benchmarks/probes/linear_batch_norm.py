"""Does BatchNorm behind a 1 x 1 convolution pay when it is computed from that convolution's input?

y = W a is linear, so its statistics follow from those of the narrow a, before y exists, and backward needs no y:
    A = a^T a,  m = sum(a) / n,  cov = A / n - m m^T;   mean = W m,  var = diag(W cov W^T),  s = gamma (var + eps)^-1/2
    dx = g (s W) + a M + const where a > 0;   M = W^T slope W,   const = offset W - m M
where slope and offset are the factors of `norm_gradient`, and sum(g (y - mean)) = rowsum(W * g^T a) - mean sum(g). This
follows when y = W a is inserted into Ioffe and Szegedy 2015, arXiv:1502.03167. s W and M are halves, both multiplied by
one power of two, as M is about 1e-5 of s W. Sums of a come out of the same product as A, whose accumulator may
truncate. One pass reads x; then g, x and dx are moved once, and y, which today is read beside g, is not. It pays if the
pass over x and this data gradient together take less than today's data gradient.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.probes import IMAGES, Contender, Probe, divides, errors, processors, small_rows
from benchmarks.probes.gradients import Operands, operands
from benchmarks.probes.halves import fma, fma_relu, normalised, where_positive
from benchmarks.probes.present import library_gradients, present, summed

K, C, SIZE = 256, 64, 56
BLOCK_ROWS, BLOCK_IN = 128, 64
EPS = 1e-4
OURS = "Gram matrix and data gradient"


@triton.jit(do_not_specialize=["tiles"])
def gram_matrix(x, x_norm, gram, tiles, C: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """One program computes (C, 2 C) of a part of the rows: a^T a in the even columns, sums of a in the odd ones."""
    row, c, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, C), tl.arange(0, 2 * C)
    program, programs = tl.program_id(0), tl.num_programs(0)
    scale, shift = tl.load(x_norm + c)[None, :], tl.load(x_norm + C + c)[None, :]
    ones = tl.full((BLOCK_ROWS, C), 1.0, tl.float16)
    result = tl.zeros((C, 2 * C), tl.float32)
    for turn in range(tl.maximum(tl.cdiv(tiles - program, programs), 1)):
        first = (program + turn * programs).to(tl.int64) * BLOCK_ROWS
        a = fma_relu(tl.load(x + first * C + (row[:, None] * C + c[None, :])), scale, shift)
        result = tl.dot(tl.trans(a), tl.join(a, ones).reshape(BLOCK_ROWS, 2 * C), result)
    tl.store(gram + program * (2 * C * C) + (c[:, None] * (2 * C) + column[None, :]), result)


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
def linear_data_gradient(
    g_tiles,
    x_tiles,
    scaled_weight,
    scaled_m,
    constants,
    x,
    x_norm,
    d_norm,
    dx,
    sums,
    parts,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One program computes whole rows of dx."""
    part = tl.program_id(0)
    c, step_in = tl.arange(0, C), tl.arange(0, BLOCK_IN)
    result = tl.zeros((BLOCK_ROWS, C), tl.float32)
    # Products: g is multiplied without a map, then a.
    for step in range(K // BLOCK_IN):
        w = tl.load(scaled_weight + ((step * BLOCK_IN + step_in)[:, None] * C + c[None, :]))
        result = tl.dot(g_tiles.load([part * BLOCK_ROWS, step * BLOCK_IN]), w, result)
    for step in range(C // BLOCK_IN):
        k = step * BLOCK_IN + step_in
        scale, shift = tl.load(x_norm + k)[None, :], tl.load(x_norm + C + k)[None, :]
        a = fma_relu(x_tiles.load([part * BLOCK_ROWS, step * BLOCK_IN]), scale, shift)
        result = tl.dot(a, tl.load(scaled_m + (k[:, None] * C + c[None, :])), result)
    # Epilogue: the power of two is taken back, and the constant is added.
    result = result * tl.load(constants + C + c)[None, :] + tl.load(constants + c)[None, :]
    store_masked(result, x, x_norm, d_norm, dx, sums, part, parts, c, C)


def launch_gram(of: Operands) -> Tensor:
    """Returns what `gram_matrix` computes, of all rows: (C, 2 C), fp32."""
    rows, _, c = of.sizes
    tiles = divides(BLOCK_ROWS, rows)
    programs = min(tiles, 2 * processors(of.x.device))
    parts = torch.empty(programs, c, 2 * c, device=of.x.device)
    gram_matrix[(programs,)](*(of.x, of.x_norm, parts, tiles), C=c, BLOCK_ROWS=BLOCK_ROWS, num_warps=4, num_stages=3)
    return summed(parts)


def launch_gradient(of: Operands, factors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns dx, (rows, C), and its sums, (2, parts, C), fp32. factors: as `gradient_factors` returns them."""
    rows, k, c = of.sizes
    parts = divides(BLOCK_ROWS, rows)
    dx, sums = torch.empty_like(of.x), torch.empty(2, parts, c, device=of.x.device)
    block = [BLOCK_ROWS, BLOCK_IN]
    linear_data_gradient[(parts,)](
        *(TensorDescriptor.from_tensor(of.g, block), TensorDescriptor.from_tensor(of.x, block), *factors),
        *(of.x, of.x_norm, of.d_norm, dx, sums, parts),
        K=k,
        C=c,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_IN=BLOCK_IN,
        num_warps=8,
        num_stages=3,
    )
    return dx, sums


def statistics(gram: Tensor, rows: int, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns m, (C,), and the mean and variance of y, (K,), in float64."""
    gram, w = gram.double() / rows, weight.double()
    m = gram[:, 1]
    return m, w @ m, ((w @ (gram[:, ::2] - m.outer(m))) * w).sum(1)


def gradient_factors(
    gram: Tensor, rows: int, weight: Tensor, products: Tensor, g_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns 2^p s W and 2^p M, halves, and the constant and 2^-p, (2, C), fp32, for a gamma of 1.

    gram: of `launch_gram`. weight: (K, C). products: g^T a, (K, C). g_sum: sum(g), (K,).
    """
    m, mean, var = statistics(gram, rows, weight)
    w, rstd = weight.double(), (var + EPS).rsqrt()
    slope = -(rstd**3) * ((w * products).sum(1) - mean * g_sum) / rows
    offset = -rstd * g_sum / rows
    of_g, of_a = rstd[:, None] * w, w.T @ (slope[:, None] * w)
    power = torch.exp2(torch.floor(torch.log2(2.0**13 / of_g.abs().max())))
    constant = torch.stack((offset @ w - m @ of_a, (1 / power).expand_as(m)))
    return (of_g * power).half(), (of_a * power).half(), constant.float()


def check(device: torch.device) -> dict[str, float]:
    of = operands(small_rows(device), K, C, device)
    rows = of.sizes[0]
    gram = launch_gram(of)
    # This is how it is done today, in float64: y, its statistics, and the gradient through BatchNorm.
    g, w, a = of.g.double(), of.weight.double(), normalised(of.x, of.x_norm).relu().double()
    y = a @ w.T
    d = y - y.mean(0)
    var = d.square().mean(0)
    rstd = (var + EPS).rsqrt()
    dy = rstd * (g - g.mean(0) - d * rstd.square() * (g * d).mean(0))
    true_dx = torch.where(a > 0, dy @ w, 0.0)
    # This is how it follows from the Gram matrix.
    dx, sums = launch_gradient(of, gradient_factors(gram, rows, of.weight, g.T @ a, g.sum(0)))
    of_x = normalised(of.x, of.d_norm).double()
    stored = dx.double()
    return errors(
        gram=(gram[:, ::2], a.T @ a),
        mean=(statistics(gram, rows, of.weight)[1], y.mean(0)),
        var=(statistics(gram, rows, of.weight)[2], var),
        dx=(dx, true_dx),
        sums=(sums.sum(1), torch.stack((stored.sum(0), (stored * of_x).sum(0)))),
    )


def contenders(device: torch.device) -> dict[str, Contender]:
    rows = IMAGES * SIZE * SIZE
    of = operands(rows, K, C, device)
    factors = of.weight, of.weight[:C].contiguous(), torch.ones(2, C, device=device)
    images = of.present(SIZE)

    def both() -> None:
        launch_gram(of)
        launch_gradient(of, factors)

    library = library_gradients(images["g"], images["x"], images["weight"], of_weight=False)
    a_pass, gradient, flops = 2 * rows * C, 2 * rows * (K + 2 * C), 2 * rows * K * C
    return {
        OURS: Contender(both, a_pass + gradient, flops + 4 * rows * C * C),
        "Gram matrix": Contender(partial(launch_gram, of), a_pass, 2 * rows * C * C),
        "data gradient": Contender(partial(launch_gradient, of, factors), gradient, flops + 2 * rows * C * C),
        "present": Contender(partial(present("convolution_data_gradient"), **images), gradient + 2 * rows * K, flops),
        "cuDNN, gradient alone": Contender(library, 2 * rows * (K + C), flops),
    }


def verdict(us: dict[str, float], factor: float) -> str:
    saved = (us["present"] - us[OURS]) * factor
    return f"{'adopt it' if saved > 0 else 'stay with y'}: saves {saved:.0f} us of the data gradient, beside forward"


PROBE = Probe(
    name="linear_batch_norm",
    question="BatchNorm behind a 1 x 1, 64 to 256 channels at 56 x 56, from the Gram matrix of its input: worth it?",
    threshold="less than the present data gradient",
    seconds=6,
    tolerance=2e-3,
    check=check,
    contenders=contenders,
    verdict=verdict,
)
