"""BatchNorm's gradients behind y = weight a, a 1 x 1 convolution, from products = g^T a: without y, and without dy.

g is the gradient of the normalised y, n its pixels, d_beta = sum(g); m and spread are those of `gram_norm`:
    d_gamma = rstd (rowsum(weight products) - mean d_beta)
    slope = -scale rstd d_gamma / n,   offset = -scale d_beta / n
    dy = scale g + slope (y - mean) + offset                   (Ioffe and Szegedy 2015, arXiv:1502.03167, section 3)
    d_weight = dy^T a = scale (products - rstd d_gamma spread - d_beta m)
    da = weight^T dy = g of_g + a of_a + constant,   of_g = scale weight,   of_a = weight^T (slope weight),
    constant = (offset - slope mean) weight
So `convolution_data_gradient` reads g and the narrow a, where it would read g and y. of_g and of_a are rounded to the
weight's dtype. They are multiplied by one power of two a column before, because of_a is about 1e-5 of of_g: the largest
value of a column is at most 2^13, or a bound of it is, and `affine` takes the power back.

Bytes: 4 a value of products and spread, 2 of the weight and of d_weight; then the weight, which each block of columns
of of_a reads from the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_tensors, check_weight, single_or_double
from kernels.configurations import cdiv, next_power_of_2
from kernels.implementation import runs_triton
from kernels.launch import launch
from kernels.norm_rows import MEAN, RSTD, SCALE, Norm, load_row
from kernels.operators import named, operator

LARGEST = tl.constexpr(13)  # the power of two that a column's values stay below; fp16 ends at 2^16
BOUND, SLOPE, INTERCEPT = (tl.constexpr(row) for row in range(3))  # of `terms`: what of_a and constant are made of


def reference(products, d_beta, norm, gram, spread, count, weight, d_weight):
    """Returns d_gamma, of_g, of_a, affine in plain PyTorch. Arguments as in `gram_gradient`."""
    rows, m = Norm(*norm), gram[-1] / count
    w, products = weight.flatten(1).to(norm.dtype), products.flatten(1)
    d_gamma = rows.rstd * ((w * products).sum(1) - rows.mean * d_beta)
    dw = rows.scale.unsqueeze(1) * (products - torch.outer(d_beta, m) - (rows.rstd * d_gamma).unsqueeze(1) * spread)
    d_weight.copy_(dw.view_as(d_weight))
    slope, offset = -rows.scale * rows.rstd * d_gamma / count, -rows.scale * d_beta / count
    of_g, of_a = rows.scale.unsqueeze(1) * w, w.T @ (slope.unsqueeze(1) * w)
    bound = (slope.abs() * w.abs().amax(1)) @ w.abs()
    exponent = torch.frexp(torch.maximum(of_g.abs().amax(0), bound)).exponent
    power = torch.ldexp(torch.ones_like(bound), LARGEST.value - exponent)
    affine = torch.stack((1 / power, (offset - slope * rows.mean) @ w))
    return d_gamma, (of_g * power).to(weight.dtype).view_as(weight), (of_a * power).to(weight.dtype), affine


@triton.jit(repr=named("gram_gradient", "BLOCK_OUT", "BLOCK_IN"))
def kernel(
    # inputs
    products, d_beta, norm, gram, spread, weight,
    # outputs
    d_gamma, d_weight, terms,
    # sizes, and what is compiled in
    K, C, count, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_OUT channels of y."""
    k = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    known = k < K
    mean, scale = load_row(norm, MEAN, k, known, K), load_row(norm, SCALE, k, known, K)
    rstd, beta = load_row(norm, RSTD, k, known, K), tl.load(d_beta + k, mask=known, other=0.0)
    inner = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)  # reduced once, behind the loop
    widest = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for c0 in range(0, C, BLOCK_IN):
        c = c0 + tl.arange(0, BLOCK_IN)
        at, inside = k[:, None] * C + c[None, :], known[:, None] & (c < C)[None, :]
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        inner += w * tl.load(products + at, mask=inside, other=0.0)
        widest = tl.maximum(widest, tl.abs(w))
    gamma = rstd * (tl.sum(inner, 1) - mean * beta)
    slope, offset = -scale * rstd * gamma / count, -scale * beta / count
    tl.store(d_gamma + k, gamma, mask=known)
    tl.store(terms + BOUND * K + k, tl.abs(slope) * tl.max(widest, 1), mask=known)
    tl.store(terms + SLOPE * K + k, slope, mask=known)
    tl.store(terms + INTERCEPT * K + k, offset - slope * mean, mask=known)
    for c0 in range(0, C, BLOCK_IN):
        c = c0 + tl.arange(0, BLOCK_IN)
        at, inside = k[:, None] * C + c[None, :], known[:, None] & (c < C)[None, :]
        m = tl.load(gram + C * C + c, mask=c < C, other=0.0) / count
        value = tl.load(products + at, mask=inside, other=0.0) - beta[:, None] * m[None, :]
        value -= (rstd * gamma)[:, None] * tl.load(spread + at, mask=inside, other=0.0)
        tl.store(d_weight + at, (scale[:, None] * value).to(d_weight.dtype.element_ty), mask=inside)


@triton.jit(repr=named("gram_gradient_weights", "BLOCK_OUT", "BLOCK_IN"))
def weights_kernel(
    # inputs
    weight, norm, terms,
    # outputs
    of_g, of_a, affine,
    # sizes, and what is compiled in
    K, C, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_IN x BLOCK_IN values of of_a; those of the same columns share out of_g's rows."""
    c = tl.program_id(0) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    d = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    # Products over the channels of y, the columns' largest values, and the constant.
    product = tl.zeros((BLOCK_IN, BLOCK_IN), tl.float32)
    largest = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    bounds = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    constants = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for k0 in range(0, K, BLOCK_OUT):
        k = k0 + tl.arange(0, BLOCK_OUT)
        known = k < K
        w = tl.load(weight + k[:, None] * C + d[None, :], mask=known[:, None] & (d < C)[None, :], other=0.0)
        v = tl.load(weight + k[:, None] * C + c[None, :], mask=known[:, None] & (c < C)[None, :], other=0.0)
        w = w.to(tl.float32)
        slope = load_row(terms, SLOPE, k, known, K)
        product = tl.dot(tl.trans(v.to(tl.float32)), slope[:, None] * w, product, input_precision=PRECISION)
        largest = tl.maximum(largest, tl.abs(load_row(norm, SCALE, k, known, K)[:, None] * w))
        bounds += load_row(terms, BOUND, k, known, K)[:, None] * tl.abs(w)
        constants += load_row(terms, INTERCEPT, k, known, K)[:, None] * w

    # The power of two, by the exponent's bits.
    most = tl.maximum(tl.max(largest, 0), tl.sum(bounds, 0))
    exponent = (most.to(tl.int32, bitcast=True) >> 23) - 126  # of a number from 1/2 up to 1
    exponent = tl.maximum(exponent, LARGEST - 126)  # so that the power and its inverse are normal
    bits = exponent - LARGEST + 127
    inverse = (bits << 23).to(tl.float32, bitcast=True)
    power = ((254 - bits) << 23).to(tl.float32, bitcast=True)

    # Store.
    block = (c < C)[:, None] & (d < C)[None, :]
    tl.store(of_a + c[:, None] * C + d[None, :], (product * power[None, :]).to(of_a.dtype.element_ty), mask=block)
    for k0 in range(tl.program_id(0) * BLOCK_OUT, K, tl.num_programs(0) * BLOCK_OUT):
        k = k0 + tl.arange(0, BLOCK_OUT)
        at, inside = k[:, None] * C + d[None, :], (k < K)[:, None] & (d < C)[None, :]
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        value = load_row(norm, SCALE, k, k < K, K)[:, None] * w * power[None, :]
        tl.store(of_g + at, value.to(of_g.dtype.element_ty), mask=inside)
    own = (d < C) & (tl.program_id(0) == 0)
    tl.store(affine + d, inverse, mask=own)
    tl.store(affine + C + d, tl.sum(constants, 0), mask=own)


@operator("gram_gradient", mutates_args=("d_weight",))
def gram_gradient(
    products: Tensor,
    d_beta: Tensor,
    norm: Tensor,
    gram: Tensor,
    spread: Tensor,
    count: int,
    weight: Tensor,
    d_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stores the weight's gradient in `d_weight`; returns d_gamma, of_g, of_a, affine.

    products: (K, C, 1, 1), fp32, of `convolution_weight_gradient`, from g and a. d_beta: (K,), fp32, the sums of g.
    norm, gram, spread, count, weight: of `gram_norm`. d_weight: (K, C, 1, 1), of the weight's dtype or fp32.
    d_gamma: (K,), fp32. of_g: like the weight; of_a: (C, C), of its dtype; affine: (2, C), fp32: the gradient of a is
    (g of_g + a of_a) affine[0] + affine[1], as `convolution_data_gradient` computes it.
    Raises ValueError for other layouts, shapes, dtypes or devices.
    """
    op, (k, c), device = "gram_gradient", weight.shape[:2], weight.device
    check_weight(op, "weight", weight, (weight.dtype,), device)
    wide = single_or_double(weight)
    rows = {"d_beta": (d_beta, (k,)), "norm": (norm, (5, k)), "gram": (gram, (c + 1, c)), "spread": (spread, (k, c))}
    check_tensors(op, device, wide, products=(products, (k, c, 1, 1)), **rows)
    check_tensors(op, device, (weight.dtype, wide), d_weight=(d_weight.flatten(1), (k, c)))
    if not runs_triton(device):
        return reference(products, d_beta, norm, gram, spread, count, weight, d_weight)
    d_gamma, terms, affine = (norm.new_empty(size) for size in ((k,), (3, k), (2, c)))
    of_g, of_a = torch.empty_like(weight), weight.new_empty((c, c))
    config = {"BLOCK_OUT": 16, "BLOCK_IN": min(128, max(16, next_power_of_2(c))), "num_warps": 4}
    inputs, outputs = (products, d_beta, norm, gram, spread, weight), (d_gamma, d_weight, terms)
    launch(kernel, (cdiv(k, config["BLOCK_OUT"]),), *inputs, *outputs, k, c, float(count), **config)
    config = {"BLOCK_OUT": 64, "BLOCK_IN": min(64, max(16, next_power_of_2(c))), "num_warps": 8}
    blocks = cdiv(c, config["BLOCK_IN"])
    precision = "tf32x3" if weight.dtype == torch.float32 else "tf32"  # halves are exact in TF32
    outputs = of_g, of_a, affine
    launch(weights_kernel, (blocks, blocks), weight, norm, terms, *outputs, k, c, PRECISION=precision, **config)
    return d_gamma, of_g, of_a, affine
