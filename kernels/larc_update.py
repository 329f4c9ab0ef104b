"""The update itself, and everything that follows from it: the last of the optimizer step's three launches.

With t a block's tensor, i = 1 / (loss scale x ranks) and lr from `trust_ratio`:
    d = ratio[t] (g i + decay v);  m = mu m + d;  v = v - lr (d + mu m)
Nesterov momentum in gradient units, as torch.optim.SGD and TensorFlow keep it (Sutskever et al. 2013, ICML, in the form
of Bengio et al. 2012, arXiv:1212.0901); where m is kept in bf16, it is rounded to that before v moves by it. Then the
copy of v in the model's dtype, and the sum of its squares per block, which is the next step's weight norm. Only if the
step is finite: an overflow leaves all of it bit-identical. Vectors may be left without decay.

In the same launch: BatchNorm's running statistics r = (1 - s) r + s b, committed by a finite step only, with b, this
step's own, set to zero for the next; the step counters; and the dynamic loss scale with the rule of
torch.amp.GradScaler (doubled after `growth_interval` finite steps in a row, halved by an overflow), kept between 1 and
MAX_LOSS_SCALE.

If an exponential moving average is kept (Polyak and Juditsky 1992, SIAM J. Control Optim. 30(4)), it moves towards the
new weights and statistics by the share a that `trust_ratio` gives: e = e + a (v - e), by a finite step only.

Bytes: 20 per parameter with fp16 gradients and model weights: reads g, v, m, writes v, m and the copy. 16 with momentum
in bf16. 8 more with an average.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.blocks import BLOCK, CHUNK, chunks, count_blocks
from kernels.checks import check_tensors
from kernels.configurations import cdiv
from kernels.implementation import runs_triton
from kernels.launch import launch, state
from kernels.operators import named, operator

PAIRINGS = tl.constexpr(BLOCK.bit_length() - 1)
MAX_LOSS_SCALE = tl.constexpr(2.0**24)  # lifts fp16's smallest number, 2^-24, to 1: no gradient needs more


def reference(
    matrix_gradient, vector_gradient, weight, momentum, model_weight, tensor_of_block, ratio, scalars,
    weight_square_sums, running, batch, counters, loss_scale, ema_weight=None, ema_running=None,
    *, momentum_factor, weight_decay, statistics_momentum, growth_interval, decay_vectors=True,
):  # fmt: skip
    """Computes the step in plain PyTorch, in the precision of `weight`. Arguments as in `larc_update`.

    Waits for the finite flag, which costs nothing on the CPU.
    """
    learning_rate, inverse, finite, *share = scalars.tolist()
    counters[0] += 1
    if finite:
        weights, momenta = weight.view(-1, BLOCK), momentum.view(-1, BLOCK)
        factor = (ratio * inverse)[tensor_of_block].unsqueeze(1)
        scratch = torch.empty_like(weights[:CHUNK])
        matrices = len(matrix_gradient) // BLOCK  # to come
        for g, w, m, f in chunks(matrix_gradient, vector_gradient, weights, momenta, factor):
            decay = weight_decay if decay_vectors or matrices > 0 else 0.0
            matrices -= len(g)
            d = torch.add(g, w, alpha=decay / inverse, out=scratch[: len(g)]).mul_(f)
            torch.add(d, m, alpha=momentum_factor, out=m)
            w.sub_(d.add_(m, alpha=momentum_factor), alpha=learning_rate)
        refresh_reference(weight, model_weight, weight_square_sums)
        running.mul_(1 - statistics_momentum).add_(batch, alpha=statistics_momentum)
        if ema_weight is not None:
            ema_weight.lerp_(weight, *share)
            ema_running.lerp_(running, *share)
        counters[1:] += 1
    else:
        counters[2] = 0
    batch.zero_()
    if growth_interval and not finite:
        loss_scale.copy_(torch.minimum(loss_scale, (loss_scale / 2).clamp(min=1)))
    elif growth_interval and counters[2] >= growth_interval:
        loss_scale.copy_(torch.maximum(loss_scale, (loss_scale * 2).clamp(max=MAX_LOSS_SCALE.value)))
        counters[2] = 0


def refresh_reference(weight, model_weight, weight_square_sums):
    """Computes `refresh` in plain PyTorch.

    `reference` calls it, as on a GPU the order in which PyTorch sums a row follows from how many rows there are.
    """
    weights = weight.view(-1, BLOCK)
    scratch = torch.empty_like(weights[:CHUNK])
    for w, sums in zip(weights.split(CHUNK), weight_square_sums.split(CHUNK), strict=True):
        torch.sum(torch.square(w, out=scratch[: len(w)]), 1, out=sums)
    if model_weight is not None:
        model_weight.copy_(weight[: len(model_weight)])


@triton.jit
def sum_by_pairs(values, BLOCK: tl.constexpr):
    """Returns the sum, in one order in every kernel; `tl.sum` follows the layout in threads."""
    for level in tl.static_range(1, PAIRINGS + 1):
        values = tl.sum(tl.reshape(values, (BLOCK >> level, 2)), 1)
    return tl.sum(values)


@triton.jit
def store_derived(w, model_weight, weight_square_sums, block, matrix_blocks, BLOCK: tl.constexpr):
    """Stores what follows from a block of new weights."""
    tl.store(weight_square_sums + block, sum_by_pairs(w * w, BLOCK))
    if model_weight is not None:  # noqa: SIM102 (decided by the compiler; the next at run time)
        if block < matrix_blocks:
            at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            tl.store(model_weight + at, w.to(model_weight.dtype.element_ty))


@triton.jit(repr=named("refresh"))
def refresh_kernel(weight, model_weight, weight_square_sums, matrix_blocks, BLOCK: tl.constexpr):
    """One program reads one block."""
    block = tl.program_id(0)
    w = tl.load(weight + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    store_derived(w, model_weight, weight_square_sums, block, matrix_blocks, BLOCK)


@triton.jit
def advance(counters, loss_scale, finite, growth_interval):
    """Moves counters and loss scale one step on."""
    good = tl.where(finite, tl.load(counters + 2) + 1, 0)
    if growth_interval > 0:
        scale = tl.load(loss_scale)
        grown = tl.maximum(scale, tl.minimum(scale * 2, MAX_LOSS_SCALE))
        halved = tl.minimum(scale, tl.maximum(scale * 0.5, 1.0))
        grows = good >= growth_interval
        tl.store(loss_scale, tl.where(finite, tl.where(grows, grown, scale), halved))
        good = tl.where(grows, 0, good)
    tl.store(counters, tl.load(counters) + 1)
    tl.store(counters + 1, tl.load(counters + 1) + finite.to(tl.int64))
    tl.store(counters + 2, good)


@triton.jit(repr=named("larc_update"))
def kernel(
    # read
    matrix_gradient, vector_gradient,
    # read and written
    weight, momentum,
    # written from weight
    model_weight,
    # read
    tensor_of_block, ratio, scalars,
    # written from weight
    weight_square_sums,
    # read and written
    running, batch, counters, loss_scale, ema_weight, ema_running,
    # sizes
    matrix_blocks, blocks, statistics,
    # factors
    momentum_factor, weight_decay, statistics_momentum, growth_interval,
    # what is compiled in
    VECTORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program updates a block of the arena, or of the running statistics, which come last. Program 0 counts."""
    block = tl.program_id(0)
    element = tl.arange(0, BLOCK)
    finite = tl.load(scalars + 2) != 0
    if block >= blocks:
        index = (block - blocks) * BLOCK + element
        inside = index < statistics
        if finite:
            kept = tl.load(running + index, mask=inside) * (1 - statistics_momentum)
            new = statistics_momentum * tl.load(batch + index, mask=inside)
            tl.store(running + index, kept + new, mask=inside)
            if ema_running is not None:
                average = tl.load(ema_running + index, mask=inside)
                average += tl.load(scalars + 3) * (kept + new - average)
                tl.store(ema_running + index, average, mask=inside)
        tl.store(batch + index, tl.zeros((BLOCK,), tl.float32), mask=inside)
    else:
        # Loaded before the flag is known: an overflow is rare, and waiting for it would cost every step.
        at = block.to(tl.int64) * BLOCK + element
        w = tl.load(weight + at)
        m = tl.load(momentum + at).to(tl.float32)
        if ema_weight is not None:
            average = tl.load(ema_weight + at)
            share = tl.load(scalars + 3)
        if block < matrix_blocks:
            g = tl.load(matrix_gradient + at).to(tl.float32)
        else:
            g = tl.load(vector_gradient + (block - matrix_blocks).to(tl.int64) * BLOCK + element)
            if not VECTORS:
                weight_decay *= 0
        r = tl.load(ratio + tl.load(tensor_of_block + block))
        learning_rate, inverse = tl.load(scalars), tl.load(scalars + 1)
        if finite:
            d = r * (g * inverse + weight_decay * w)
            kept = (momentum_factor * m + d).to(momentum.dtype.element_ty)
            w -= learning_rate * (d + momentum_factor * kept.to(tl.float32))
            tl.store(momentum + at, kept)
            tl.store(weight + at, w)
            if ema_weight is not None:
                tl.store(ema_weight + at, average + share * (w - average))
            store_derived(w, model_weight, weight_square_sums, block, matrix_blocks, BLOCK)
        if block == 0:
            advance(counters, loss_scale, finite, growth_interval)


# Without fused multiply-adds, which a compiler may place differently in the two kernels, and by pairs, the sums of
# `refresh` are the update's to the bit. Both wait for memory: it costs nothing. 8 values a thread, 16 bytes of fp16;
# with 16, in 64 registers, Triton 3.9 spills.
CONFIG = {"num_warps": 8, "enable_fp_fusion": False}


WRITTEN = (
    *("weight", "momentum", "model_weight", "weight_square_sums", "running", "batch", "counters", "loss_scale"),
    *("ema_weight", "ema_running"),
)


@operator("larc_update", mutates_args=WRITTEN)
def larc_update(
    matrix_gradient: Tensor,
    vector_gradient: Tensor,
    weight: Tensor,
    momentum: Tensor,
    model_weight: Tensor | None,
    tensor_of_block: Tensor,
    ratio: Tensor,
    scalars: Tensor,
    weight_square_sums: Tensor,
    running: Tensor,
    batch: Tensor,
    counters: Tensor,
    loss_scale: Tensor,
    ema_weight: Tensor | None = None,
    ema_running: Tensor | None = None,
    *,
    momentum_factor: float,
    weight_decay: float,
    statistics_momentum: float,
    growth_interval: int,
    decay_vectors: bool = True,
) -> None:
    """Does one step of SGD with LARC, Nesterov momentum and weight decay, in place, and all that goes with it.

    matrix_gradient: (M,), fp16, bf16 or fp32. vector_gradient: (V,), fp32. M and V are multiples of BLOCK, either may
    be 0; B = (M + V) / BLOCK. weight: (M + V,), fp32. momentum: (M + V,), fp32 or bf16. model_weight: (M,), fp16 or
    bf16, or None where the model computes in fp32; matrix_gradient has its dtype or fp32. tensor_of_block: (B,), int32,
    values below T. ratio: (T,), and scalars: (3,), fp32, from `trust_ratio`. weight_square_sums: (B,), fp32, written.
    running, batch: (R,), fp32, any R. counters: (3,), int64: steps, applied updates, finite steps since the loss scale
    last changed. loss_scale: (1,), fp32. ema_weight: (M + V,), and ema_running: (R,), fp32: their moving averages, or
    None where there are none; with them scalars is (4,).
    decay_vectors: whether the decay is that of vectors, too.
    growth_interval: finite steps after which the loss scale doubles; 0 keeps it as it is. statistics_momentum: the
    weight of `batch` in the new running statistics. Raises ValueError for other shapes, dtypes or devices.
    """
    op, device, float32 = "larc_update", weight.device, torch.float32
    matrix_blocks, blocks = count_blocks(op, matrix_gradient, vector_gradient)
    matrix, elements, statistics = matrix_blocks * BLOCK, blocks * BLOCK, running.numel()
    check_model_weight(op, model_weight, matrix, device)
    gradient_dtypes = (float32,) if model_weight is None else (model_weight.dtype, float32)
    check_tensors(op, device, gradient_dtypes, matrix_gradient=(matrix_gradient, (matrix,)))
    check_tensors(op, device, (float32, torch.bfloat16), momentum=(momentum, (elements,)))
    check_tensors(
        op,
        device,
        float32,
        vector_gradient=(vector_gradient, (elements - matrix,)),
        weight=(weight, (elements,)),
        ratio=(ratio, (ratio.numel(),)),
        scalars=(scalars, (3,) if ema_weight is None else (4,)),
        weight_square_sums=(weight_square_sums, (blocks,)),
        running=(running, (statistics,)),
        batch=(batch, (statistics,)),
        loss_scale=(loss_scale, (1,)),
        ema_weight=(ema_weight, (elements,)),
        ema_running=(ema_running, (statistics,)),
    )
    if (ema_weight is None) != (ema_running is None):
        raise ValueError(f"{op}: give both of ema_weight and ema_running, or none")
    check_tensors(op, device, torch.int32, tensor_of_block=(tensor_of_block, (blocks,)))
    check_tensors(op, device, torch.int64, counters=(counters, (3,)))
    if growth_interval < 0:
        raise ValueError(f"{op}: growth_interval must be 0 (a static loss scale) or more, got {growth_interval}")
    inputs = (matrix_gradient, vector_gradient, weight, momentum, model_weight, tensor_of_block, ratio, scalars)
    arguments = (*inputs, weight_square_sums, running, batch, counters, loss_scale, ema_weight, ema_running)
    factors: dict[str, Any] = {
        "momentum_factor": momentum_factor,
        "weight_decay": weight_decay,
        "statistics_momentum": statistics_momentum,
        "growth_interval": growth_interval,
    }
    if runs_triton(device):
        sizes, grid = (matrix_blocks, blocks, statistics), (blocks + cdiv(statistics, BLOCK),)
        launch(kernel, grid, *arguments, *sizes, **factors, VECTORS=decay_vectors, BLOCK=BLOCK, **CONFIG)
    elif not state.silent:  # the reference reads values
        reference(*arguments, **factors, decay_vectors=decay_vectors)


@operator("refresh", mutates_args=("model_weight", "weight_square_sums"))
def refresh(weight: Tensor, model_weight: Tensor | None, weight_square_sums: Tensor) -> None:
    """Rebuilds what `larc_update` derives from the weights, to the same bits. Call it after any other write to them.

    weight: (M + V,), fp32. model_weight: (M,), fp16 or bf16, or None; weight_square_sums: (B,), fp32; both written.
    Raises ValueError for other shapes, dtypes or devices.
    """
    op, device = "refresh", weight.device
    matrix = 0 if model_weight is None else len(model_weight)
    matrix_blocks, blocks = count_blocks(op, weight[:matrix], weight[matrix:])
    check_model_weight(op, model_weight, matrix, device)
    expected = {"weight": (weight, (blocks * BLOCK,)), "weight_square_sums": (weight_square_sums, (blocks,))}
    check_tensors(op, device, torch.float32, **expected)
    if runs_triton(device):
        arguments = (weight, model_weight, weight_square_sums, matrix_blocks)
        launch(refresh_kernel, (blocks,), *arguments, BLOCK=BLOCK, **CONFIG)
    elif not state.silent:
        refresh_reference(weight, model_weight, weight_square_sums)


def check_model_weight(op: str, model_weight: Tensor | None, elements: int, device: torch.device) -> None:
    """Raises ValueError unless the copy in the model's dtype fits, where there is one."""
    check_tensors(op, device, (torch.float16, torch.bfloat16), model_weight=(model_weight, (elements,)))
