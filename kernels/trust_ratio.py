"""Norms and LARC multiplier of every tensor, the finite flag, the learning rate: the second of the step's launches.

And, as it is a launch that sums, what the step's loss was: see `average_rows`.

With v a tensor's weight and g its gradient (averaged, unscaled, decayed): q = eta ||v|| / ||g|| if both norms are
non-zero, else 1. The update multiplies g by 1 (mode `off`), min(q / learning rate, 1) (`clip`) or q (`scale`).
Tensors from number `excluded_from` on are left to plain SGD, 1 in every mode, as gamma, beta and biases are by MLPerf's
LARS (which also spares them the decay).

With `clip_norm` g is clipped before the decay d is added, to c g: c = min(1, clip_norm / norm of the gradient of all
tensors, without decay), as torch.nn.utils.clip_grad_norm_ does (Pascanu, Mikolov and Bengio 2013, arXiv:1211.5063).
||c g + d v||^2 = c (c G + C) + W, of which `gradient_statistics` has stored the three terms; nothing cancels but what
does in c g + d v. c goes into the factor by which the update unscales g.

With `ema_decay` the share of new weights in their moving average is 1 - min(ema_decay, (1 + n) / (10 + n)) after n
updates, as TensorFlow's ExponentialMovingAverage has it: so the first weights, which are random, do not linger.

LARC is LARS (You, Gitman and Ginsburg 2017, arXiv:1708.03888) with the clip; this is nvcnn_hvd.py's. Others differ:
apex and timm add the decay to the denominator after the norms.

The finite flag is that of the sum of all gradients' square sums. Bytes: 8 per block, out of the L2 cache; to clip, 16,
and each tensor's program reads 4 of every other block, too.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_tensors
from kernels.implementation import runs_triton
from kernels.launch import launch, state
from kernels.operators import named, operator

MODES = ("off", "clip", "scale")
KEPT, NEW = tl.constexpr(0.9), tl.constexpr(0.1)  # of an average, of what it follows: as the original's
SMALLEST = tl.constexpr(2.0**-126)  # of the normal numbers of fp32


def reference(
    gradient_square_sums, weight_square_sums, first_block, counters, loss_scale, schedule,
    rows, ratio, gradient_norm, weight_norm, scalars, latest, average,
    *, ranks, larc_mode, eta, excluded_from, clip_norm=0.0, ema_decay=0.0,
):  # fmt: skip
    """Computes the results in plain PyTorch, in the precision of `scalars`. Arguments as in `trust_ratio`."""
    learning_rate = schedule[counters[:1].clamp(max=len(schedule) - 1)]
    finite = gradient_square_sums.view(-1).sum(0, keepdim=True).isfinite()
    inverse = 1 / (loss_scale * ranks)
    if clip_norm:
        first, second, third = gradient_square_sums.double()
        clip = (clip_norm / first.sum().sqrt()).clamp(max=1)
        gradient_square_sums = clip * (clip * first + second) + third
        inverse = (inverse * clip).clamp(min=SMALLEST.value)
    share = [(9 / (10 + counters[1:2])).clamp(min=1 - ema_decay)] if ema_decay else []
    scalars.copy_(torch.cat((learning_rate, inverse, finite, *share)))

    offsets = first_block.long()
    for norm, square_sums in ((gradient_norm, gradient_square_sums), (weight_norm, weight_square_sums)):
        norm.copy_(torch.segment_reduce(square_sums.double(), "sum", offsets=offsets).clamp_(min=0).sqrt_())
    q = torch.where((gradient_norm != 0) & (weight_norm != 0), eta * weight_norm / gradient_norm, 1)
    if larc_mode == "off":
        ratio.fill_(1)
    elif larc_mode == "clip":
        ratio.copy_(torch.where(q < learning_rate, q / learning_rate, 1))
    else:
        ratio.copy_(q)
    ratio[excluded_from:] = 1

    latest.copy_(rows.double().mean(0))  # one rounding to fp32: on a GPU a mean is a product with a rounded 1 / N
    moved = KEPT.value * average + NEW.value * F.pad(latest.double(), (0, 1), value=1.0)
    average.copy_(torch.where(latest[0].isfinite(), moved, average))


@triton.jit
def sum_range(values, first, last, CHUNK: tl.constexpr):
    """Returns the sum of values[first:last], always in the same order."""
    at = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), tl.float32)
    at += first
    while first < last:  # Triton 3.6's interpreter cannot take `range` of loaded values with numpy 2.4
        total += tl.load(values + at, mask=at < last, other=0.0)
        at += CHUNK
        first += CHUNK
    return tl.sum(total)


@triton.jit
def clip_factor(square_sums, first_block, tensors, clip_norm, CHUNK: tl.constexpr):
    """Returns that by which all gradients are multiplied, the same in each program."""
    square = sum_range(square_sums, tl.load(first_block), tl.load(first_block + tensors), CHUNK)
    return tl.minimum(tl.div_rn(clip_norm, tl.sqrt_rn(square)), 1.0)


@triton.jit
def average_rows(rows, latest, average, N, CHUNK: tl.constexpr):
    """Stores the mean of N rows of 3. If its first value, the loss, is finite, the averages follow it."""
    column = tl.arange(0, 4)
    total = tl.zeros((CHUNK // 4, 4), tl.float32)
    for first in range(0, N, CHUNK // 4):
        row = first + tl.arange(0, CHUNK // 4)[:, None]
        total += tl.load(rows + row * 3 + column[None, :], mask=(row < N) & (column < 3)[None, :], other=0.0)
    mean = tl.div_rn(tl.sum(total, 0), N * 1.0)
    loss = tl.sum(tl.where(column == 0, mean, 0.0))
    old, new = tl.load(average + column), tl.where(column < 3, mean, 1.0).to(tl.float64)
    tl.store(average + column, tl.where(tl.abs(loss) < float("inf"), KEPT * old + NEW * new, old))
    tl.store(latest + column, mean, mask=column < 3)


@triton.jit(repr=named("trust_ratio"))
def kernel(
    # read
    gradient_square_sums, weight_square_sums, first_block, counters, loss_scale, schedule, rows,
    # written
    ratio, gradient_norm, weight_norm, scalars, latest, average,
    # sizes
    tensors, steps, N,
    # factors
    ranks, eta, excluded_from, clip_norm, ema_share,
    # what is compiled in
    MODE: tl.constexpr, CLIP: tl.constexpr, EMA: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program computes one tensor; then one the scalars, one the loss. None reads what another writes."""
    t = tl.program_id(0)
    learning_rate = tl.load(schedule + tl.minimum(tl.load(counters), steps - 1))
    if t == tensors:
        blocks = tl.load(first_block + tensors)
        if CLIP:
            blocks *= 3
        total = sum_range(gradient_square_sums, tl.load(first_block), blocks, CHUNK)
        finite = (tl.abs(total) < float("inf")).to(tl.float32)  # false for NaN
        inverse = tl.div_rn(1.0, tl.load(loss_scale) * ranks)
        if CLIP:
            clip = clip_factor(gradient_square_sums, first_block, tensors, clip_norm, CHUNK)
            inverse = tl.maximum(inverse * clip, SMALLEST)
        tl.store(scalars, learning_rate)
        tl.store(scalars + 1, inverse)
        tl.store(scalars + 2, finite)
        if EMA:
            updates = tl.load(counters + 1).to(tl.float32)
            tl.store(scalars + 3, tl.maximum(tl.div_rn(9.0, 10 + updates), ema_share))
    elif t > tensors:
        average_rows(rows, latest, average, N, CHUNK)
    else:
        first, last = tl.load(first_block + t), tl.load(first_block + t + 1)
        square = sum_range(gradient_square_sums, first, last, CHUNK)
        if CLIP:
            blocks = tl.load(first_block + tensors)
            clip = clip_factor(gradient_square_sums, first_block, tensors, clip_norm, CHUNK)
            second = sum_range(gradient_square_sums, first + blocks, last + blocks, CHUNK)
            third = sum_range(gradient_square_sums, first + 2 * blocks, last + 2 * blocks, CHUNK)
            square = tl.maximum(clip * (clip * square + second) + third, 0.0)
        g = tl.sqrt_rn(square)
        w = tl.sqrt_rn(sum_range(weight_square_sums, first, last, CHUNK))
        q = tl.where((g != 0) & (w != 0), tl.div_rn(eta * w, g), 1.0)
        if MODE == "off":
            r = 1.0
        elif MODE == "clip":
            r = tl.where(q < learning_rate, tl.div_rn(q, learning_rate), 1.0)
        else:
            r = q
        tl.store(ratio + t, tl.where(t < excluded_from, r, 1.0))
        tl.store(gradient_norm + t, g)
        tl.store(weight_norm + t, w)


CONFIG = {"CHUNK": 4096, "num_warps": 8}


@operator("trust_ratio", mutates_args=("ratio", "gradient_norm", "weight_norm", "scalars", "latest", "average"))
def trust_ratio(
    gradient_square_sums: Tensor,
    weight_square_sums: Tensor,
    first_block: Tensor,
    counters: Tensor,
    loss_scale: Tensor,
    schedule: Tensor,
    rows: Tensor,
    ratio: Tensor,
    gradient_norm: Tensor,
    weight_norm: Tensor,
    scalars: Tensor,
    latest: Tensor,
    average: Tensor,
    *,
    ranks: int,
    larc_mode: str,
    eta: float,
    excluded_from: int,
    clip_norm: float = 0.0,
    ema_decay: float = 0.0,
) -> None:
    """Stores each tensor's LARC ratio and norms, the scalars, and the averages of the loss.

    scalars: learning rate; what the update multiplies the gradient by, 1 / (loss scale x ranks), where it is clipped
    less; finite (1 or 0); with ema_decay, which is 0 where there is no average, the share of new weights in it.

    gradient_square_sums, weight_square_sums: (B,), fp32, sums of squares per block; with clip_norm, which is 0 where
    nothing is clipped, the first is (3, B), as `gradient_statistics` has it. first_block: (T + 1,), int32, the
    blocks of tensor t are first_block[t] to first_block[t + 1] - 1. counters: (3,), int64, the first is the step.
    loss_scale: (1,), fp32. schedule: (steps,), fp32, the learning rate of every step; later steps keep the last one.
    rows: (N, 3), fp32, from `cross_entropy`; N may be 0. larc_mode: off, clip or scale. excluded_from: the number of
    the first tensor whose ratio is always 1; T for none.
    ratio, gradient_norm, weight_norm: (T,), fp32, and scalars: (3,), or with ema_decay (4,), fp32, are written. Where
    the step is not finite, ratio and gradient_norm may not be either. latest: (3,), fp32, is written: the mean row.
    average: (4,), fp64, the exponential averages of latest and of 1, moves on, unless the mean loss is not finite (or N
    is 0). Raises ValueError for anything else.
    """
    op, device = "trust_ratio", scalars.device
    blocks, tensors, steps = gradient_square_sums.shape[-1], first_block.numel() - 1, schedule.numel()
    check_tensors(
        op,
        device,
        torch.float32,
        gradient_square_sums=(gradient_square_sums, (3, blocks) if clip_norm else (blocks,)),
        weight_square_sums=(weight_square_sums, (blocks,)),
        loss_scale=(loss_scale, (1,)),
        schedule=(schedule, (steps,)),
        rows=(rows, (len(rows), 3)),
        ratio=(ratio, (tensors,)),
        gradient_norm=(gradient_norm, (tensors,)),
        weight_norm=(weight_norm, (tensors,)),
        scalars=(scalars, (4,) if ema_decay else (3,)),
        latest=(latest, (3,)),
    )
    check_tensors(op, device, torch.int32, first_block=(first_block, (tensors + 1,)))
    check_tensors(op, device, torch.int64, counters=(counters, (3,)))
    check_tensors(op, device, torch.float64, average=(average, (4,)))
    if larc_mode not in MODES or min(tensors, steps, ranks) < 1:
        raise ValueError(
            f"{op}: needs at least one tensor, step and rank and a mode of {', '.join(MODES)}, "
            f"got {tensors} tensors, {steps} steps, {ranks} ranks, mode {larc_mode}"
        )
    if not clip_norm >= 0:
        raise ValueError(f"{op}: clip_norm must be 0 (nothing is clipped) or more, got {clip_norm}")
    if not 0 <= ema_decay < 1:
        raise ValueError(f"{op}: ema_decay must be at least 0 (nothing is averaged) and below 1, got {ema_decay}")
    if excluded_from < 0:
        raise ValueError(f"{op}: excluded_from must be the number of a tensor, 0 or more, got {excluded_from}")
    inputs = (gradient_square_sums, weight_square_sums, first_block, counters, loss_scale, schedule, rows)
    arguments = (*inputs, ratio, gradient_norm, weight_norm, scalars, latest, average)
    factors: dict[str, Any] = {"ranks": ranks, "eta": eta, "excluded_from": excluded_from, "clip_norm": clip_norm}
    compiled = {"MODE": larc_mode, "CLIP": clip_norm > 0, "EMA": ema_decay > 0}
    if runs_triton(scalars.device):
        sizes = {"tensors": tensors, "steps": steps, "N": len(rows)}
        launch(kernel, (tensors + 2,), *arguments, **sizes, **factors, ema_share=1 - ema_decay, **compiled, **CONFIG)
    elif not state.silent:  # the reference reads values
        reference(*arguments, larc_mode=larc_mode, ema_decay=ema_decay, **factors)
