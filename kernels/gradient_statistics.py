"""square_sums[b] = sum over block b of (g + S R d v)^2, over (S R)^2: the first of the optimizer step's three launches.

g is the gradient of the loss times the loss scale S, summed over R ranks; v the weight; d the weight decay, part of the
gradient whose norm LARC takes (You, Gitman and Ginsburg 2017, arXiv:1708.03888; NVIDIA's nvcnn_hvd.py): the sum is that
of (g / (S R) + d v)^2 with one division a block. It is finite unless an element is not, or the square of a finite one,
scaled as it is, leaves fp32: both are overflows, and their step is skipped. Vectors may be left without decay.

Where the gradient is to be clipped, to c g, and c is not known yet, the terms of sum((c g / (S R) + d v)^2) are stored
each for itself, those of c^2, c and 1: sum(g^2) / (S R)^2, 2 d sum(g v) / (S R), d^2 sum(v^2).

Bytes: reads g and v once, 6 per parameter with an fp16 gradient; without decay g alone, 2. Writes 4 per block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.blocks import BLOCK, CHUNK, chunks, count_blocks
from kernels.checks import HALF_AND_SINGLE, check_tensors
from kernels.implementation import runs_triton
from kernels.launch import launch, state
from kernels.operators import named, operator


def reference(
    matrix_gradient, vector_gradient, weight, loss_scale, square_sums, *, ranks, weight_decay, decay_vectors=True
):
    """Computes the sums in plain PyTorch, in the precision of `weight`. Arguments as in `gradient_statistics`."""
    scale = loss_scale.item() * ranks
    weights = weight.view(-1, BLOCK)
    terms = square_sums.view(-1, len(weights)).T
    scratch = torch.empty_like(weights[:CHUNK])
    matrices = len(matrix_gradient) // BLOCK  # to come
    for gradient, w, sums in chunks(matrix_gradient, vector_gradient, weights, terms):
        g = scratch[: len(gradient)]
        decay = weight_decay if decay_vectors or matrices > 0 else 0.0
        matrices -= len(g)
        if decay and square_sums.ndim == 1:
            torch.add(gradient, w, alpha=scale * decay, out=g).square_()
        else:
            g.copy_(gradient).square_()
        torch.sum(g, 1, out=sums[:, 0])
        if square_sums.ndim == 2:
            sums[:, 1] = 2 * decay / scale * (gradient * w).sum(1)
            sums[:, 2] = decay**2 * w.square().sum(1)
    terms[:, 0].mul_(1 / scale).mul_(1 / scale)


@triton.jit(repr=named("gradient_statistics"))
def kernel(
    # read
    matrix_gradient, vector_gradient, weight, loss_scale,
    # written
    square_sums,
    # sizes and factors
    matrix_blocks, ranks, weight_decay,
    # what is compiled in
    DECAY: tl.constexpr, VECTORS: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program sums one block."""
    block = tl.program_id(0)
    element = tl.arange(0, BLOCK)
    if block < matrix_blocks:
        g = tl.load(matrix_gradient + block.to(tl.int64) * BLOCK + element).to(tl.float32)
    else:
        g = tl.load(vector_gradient + (block - matrix_blocks).to(tl.int64) * BLOCK + element)
    scale = tl.load(loss_scale) * ranks
    inverse = tl.div_rn(1.0, scale)
    second, third = 0.0, 0.0
    if DECAY:
        if not VECTORS:
            weight_decay = tl.where(block < matrix_blocks, weight_decay, 0.0)
        w = tl.load(weight + block.to(tl.int64) * BLOCK + element)
        if TERMS:
            second = 2 * weight_decay * inverse * tl.sum(g * w)
            third = weight_decay * weight_decay * tl.sum(w * w)
        else:
            g += (scale * weight_decay) * w
    if TERMS:
        blocks = tl.num_programs(0)
        tl.store(square_sums + blocks + block, second)
        tl.store(square_sums + 2 * blocks + block, third)
    tl.store(square_sums + block, tl.sum(g * g) * inverse * inverse)


CONFIG = {"num_warps": 4}


@operator("gradient_statistics", mutates_args=("square_sums",))
def gradient_statistics(
    matrix_gradient: Tensor,
    vector_gradient: Tensor,
    weight: Tensor,
    loss_scale: Tensor,
    square_sums: Tensor,
    *,
    ranks: int,
    weight_decay: float,
    decay_vectors: bool = True,
) -> None:
    """Stores the sum of squares of the averaged, unscaled, decayed gradient of each block.

    matrix_gradient: (M,), fp16, bf16 or fp32. vector_gradient: (V,), fp32. M and V are multiples of BLOCK, either may
    be 0. weight: (M + V,), fp32, read only if weight_decay is not 0. loss_scale: (1,), fp32.
    decay_vectors: whether the decay is that of vectors, too. square_sums: fp32, written: (B,), with
    B = (M + V) / BLOCK; or (3, B), the terms of c^2, c and 1. Raises ValueError for other shapes, dtypes or devices.
    """
    tensors = (matrix_gradient, vector_gradient, weight, loss_scale, square_sums)
    op, device = "gradient_statistics", weight.device
    matrix_blocks, blocks = count_blocks(op, matrix_gradient, vector_gradient)
    check_tensors(op, device, HALF_AND_SINGLE, matrix_gradient=(matrix_gradient, (matrix_blocks * BLOCK,)))
    check_tensors(
        op,
        device,
        torch.float32,
        vector_gradient=(vector_gradient, ((blocks - matrix_blocks) * BLOCK,)),
        weight=(weight, (blocks * BLOCK,)),
        loss_scale=(loss_scale, (1,)),
        square_sums=(square_sums, (blocks,) if square_sums.ndim == 1 else (3, blocks)),
    )
    if ranks < 1:
        raise ValueError(f"{op}: ranks must be at least 1, got {ranks}")
    if runs_triton(weight.device):
        scalars = (matrix_blocks, ranks, weight_decay)
        options = {"DECAY": weight_decay != 0, "VECTORS": decay_vectors, "TERMS": square_sums.ndim == 2}
        launch(kernel, (blocks,), *tensors, *scalars, **options, BLOCK=BLOCK, **CONFIG)
    elif not state.silent:  # there may be no values
        reference(*tensors, ranks=ranks, weight_decay=weight_decay, decay_vectors=decay_vectors)
