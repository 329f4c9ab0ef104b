"""BatchNorm's `norm` of y = weight a, a 1 x 1 convolution, from the Gram matrix of a: before there is a y.

    m = sum(a) / n,   cov = a^T a / n - m m^T,   spread = weight cov
    mean = weight m,   var = rowsum(weight spread),   rstd = (var + eps)^-1/2,   scale = gamma rstd
    (y - mean) scale + beta  =  y scale + shift
This follows when y = weight a is inserted into Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1. So the
convolution's epilogue can normalise, and y is never stored. Backward reads `spread` again (`gram_gradient`).

The products have 24 bits of their operands or, on tensor cores, in three products of TF32. cov is a difference: if m
is large against the deviation, its square over the variance times the error of gram, 2^-24 of itself and what tensor
cores cut off, is the error of the variance.

Bytes: 4 a value of gram, which each block of channels of y reads from the L2 cache; 2 a value of the weight, 4 written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.batch_norm_statistics import check_statistics, norm_of
from kernels.checks import check_tensors, check_weight, single_or_double
from kernels.configurations import cdiv, next_power_of_2
from kernels.implementation import runs_triton
from kernels.launch import launch
from kernels.norm_rows import MEAN, MEAN_LOW, RSTD, SCALE, SHIFT, Norm
from kernels.operators import named, operator


def reference(gram, count, weight, gamma, beta, batch_mean, batch_var, eps):
    """Returns norm, shift, spread in plain PyTorch. Arguments as in `gram_norm`."""
    gram, w = gram / count, weight.flatten(1).to(gram.dtype)
    m = gram[-1]
    spread = w @ (gram[:-1] - torch.outer(m, m))
    batch_mean.copy_(w @ m)
    var = (w * spread).sum(1).clamp_(min=0)
    norm = norm_of(batch_mean, var, gamma, beta, eps)
    torch.mul(var, count / (count - 1), out=batch_var)
    return norm, torch.addcmul(beta, batch_mean, Norm(*norm).scale, value=-1), spread


@triton.jit(repr=named("gram_norm_spread", "BLOCK_OUT", "BLOCK_IN"))
def spread_kernel(gram, weight, spread, K, C, count, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    """One program computes BLOCK_OUT channels of y x BLOCK_IN of a."""
    k = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    d = tl.program_id(1) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    m_d = tl.load(gram + C * C + d, mask=d < C, other=0.0) / count
    product = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for c0 in range(0, C, BLOCK_IN):
        c = c0 + tl.arange(0, BLOCK_IN)
        m_c = tl.load(gram + C * C + c, mask=c < C, other=0.0) / count
        inside = (c < C)[:, None] & (d < C)[None, :]
        cov = tl.load(gram + c[:, None] * C + d[None, :], mask=inside, other=0.0) / count - m_c[:, None] * m_d[None, :]
        inside = (k < K)[:, None] & (c < C)[None, :]
        w = tl.load(weight + k[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        product = tl.dot(w, cov, product, input_precision="tf32x3")
    tl.store(spread + k[:, None] * C + d[None, :], product, mask=(k < K)[:, None] & (d < C)[None, :])


@triton.jit(repr=named("gram_norm", "BLOCK_OUT", "BLOCK_IN"))
def kernel(
    # inputs
    gram, weight, spread, gamma, beta,
    # outputs
    norm, shift, batch_mean, batch_var,
    # sizes, and what is compiled in
    K, C, count, eps, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_OUT channels of y."""
    k = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    known = k < K
    means = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)  # added up once, behind the loop
    variances = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for c0 in range(0, C, BLOCK_IN):
        c = c0 + tl.arange(0, BLOCK_IN)
        at, inside = k[:, None] * C + c[None, :], known[:, None] & (c < C)[None, :]
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        means += w * (tl.load(gram + C * C + c, mask=c < C, other=0.0) / count)[None, :]
        variances += w * tl.load(spread + at, mask=inside, other=0.0)
    mean, var = tl.sum(means, 1), tl.sum(variances, 1)
    var = tl.where(var < 0, 0.0, var)  # NaN stays
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    scale = tl.load(gamma + k, mask=known) * rstd
    offset = tl.load(beta + k, mask=known)
    tl.store(norm + MEAN * K + k, mean, mask=known)
    tl.store(norm + SCALE * K + k, scale, mask=known)
    tl.store(norm + SHIFT * K + k, offset, mask=known)
    tl.store(norm + RSTD * K + k, rstd, mask=known)
    tl.store(norm + MEAN_LOW * K + k, tl.zeros_like(mean), mask=known)
    tl.store(shift + k, offset - mean * scale, mask=known)
    tl.store(batch_mean + k, mean, mask=known)
    tl.store(batch_var + k, var * (count / (count - 1)), mask=known)


@operator("gram_norm", mutates_args=("batch_mean", "batch_var"))
def gram_norm(
    gram: Tensor,
    count: int,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns norm, (5, K), shift, (K,), and spread, (K, C), all fp32.

    gram: (C + 1, C), fp32, of `gram_matrix`. count: pixels of y, N H W, at least 2. weight: (K, C, 1, 1), fp16, bf16 or
    fp32. gamma, beta: (K,), fp32. batch_mean, batch_var: (K,), fp32, written: mean and unbiased variance of y.
    Raises ValueError for other layouts, shapes, dtypes or devices.
    """
    op, (k, c) = "gram_norm", weight.shape[:2]
    check_weight(op, "weight", weight, (weight.dtype,), gram.device)
    wide = single_or_double(weight)
    check_tensors(op, gram.device, wide, gram=(gram, (c + 1, c)))
    check_statistics(op, gram, count, k, gamma=gamma, beta=beta, batch_mean=batch_mean, batch_var=batch_var)
    if weight.shape[2:] != (1, 1):
        raise ValueError(f"{op}: weight must be (K, C, 1, 1), got {tuple(weight.shape)}")
    if not runs_triton(gram.device):
        return reference(gram, count, weight, gamma, beta, batch_mean, batch_var, eps)
    norm, shift, spread = (gram.new_empty(size) for size in ((5, k), (k,), (k, c)))
    blocks = {"BLOCK_OUT": 32, "BLOCK_IN": min(64, max(16, next_power_of_2(c)))}
    grid = cdiv(k, blocks["BLOCK_OUT"]), cdiv(c, blocks["BLOCK_IN"])
    launch(spread_kernel, grid, gram, weight, spread, k, c, float(count), **blocks, num_warps=4)
    blocks = {"BLOCK_OUT": 16, "BLOCK_IN": min(128, max(16, next_power_of_2(c)))}
    inputs, outputs = (gram, weight, spread, gamma, beta), (norm, shift, batch_mean, batch_var)
    launch(kernel, (cdiv(k, 16),), *inputs, *outputs, k, c, float(count), eps, **blocks, num_warps=4)
    return norm, shift, spread
