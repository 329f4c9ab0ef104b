"""loss_n = -sum over k of q[n, k] log p[n, k], p = softmax(logits), its gradient, and whether the row is a hit.

q is the target smoothed: (1 - s) t + s / K, with t the label's one-hot row or a soft target (Szegedy et al. 2015,
arXiv:1512.00567, section 7; mixup's soft targets: Zhang et al. 2017, arXiv:1710.09412). Of a mixed batch t is share
times that one-hot row and 1 - share times the one of the batch in reverse order. The gradient is p sum(q) - q, times
loss scale / N: that of the mean loss, scaled. All is fp32, each sum in one fixed order.

The label's rank is the number of logits above it, plus those equal to it with a lower index, so that a row of equal
logits hits one class and not every class. A hit is rank 0, or below 5; a row with a logit that is not finite is none.

Bytes: reads the logits once, writes the gradient once: 4 per fp16 logit. Soft targets are 4 more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.checks import HALF_AND_SINGLE, check_tensors, single_or_double
from kernels.configurations import Configuration, cdiv, configuration, dtype_name, next_power_of_2
from kernels.implementation import runs_triton
from kernels.launch import launch
from kernels.operators import named, operator

MAX_CLASSES = 2**15  # a program holds its whole row in registers


def reference(logits, targets, loss_scale, label_smoothing, share=None):
    """Returns rows and gradient in plain PyTorch, in fp32 or fp64. Arguments as in `cross_entropy`."""
    x = logits.to(single_or_double(logits))
    n, classes = x.shape
    soft, cold = targets.dim() == 2, label_smoothing / classes
    label = targets.argmax(1, keepdim=True) if soft else targets[:, None]
    valid = (label >= 0) & (label < classes)
    if share is not None:
        valid &= valid.flip(0)
        own, other = (each.where(valid, 0) for each in (label, label.flip(0)))
        label = torch.where(share >= 0.5, own, other)
    at_label = label.where(valid, 0)
    if soft:
        q = targets.mul(1 - label_smoothing).add_(cold)
    elif share is not None:
        q = torch.full_like(x, cold)
        for each, part in ((own, share), (other, 1 - share)):
            q.scatter_add_(1, each, (part * (1 - label_smoothing)).to(x.dtype).expand(n, 1))
    else:
        q = torch.full_like(x, cold).scatter_(1, at_label, 1 - label_smoothing + cold)
    log_p = x.log_softmax(1)
    if soft or label_smoothing or share is not None:
        loss = -(q * log_p).sum(1, keepdim=True)
    else:
        loss = -log_p.gather(1, at_label)  # no sum: 0 times the infinity of a masked class would be NaN
    y = x.gather(1, at_label)
    ahead = (x > y) | ((x == y) & (torch.arange(classes, device=x.device) < label))
    finite = x.abs().amax(1, keepdim=True).isfinite()
    rank = ahead.sum(1, keepdim=True).where(valid & finite, classes + 5)
    rows = torch.cat([loss.where(valid, torch.nan), rank < 1, rank < 5], 1)
    gradient = log_p.exp_().mul_(q.sum(1, keepdim=True)).sub_(q).mul_((loss_scale / n).where(valid, torch.nan))
    return rows, gradient.to(logits.dtype)


@triton.jit(repr=named("cross_entropy"))
def kernel(
    # inputs
    logits, targets, loss_scale, share,
    # outputs
    rows, gradient,
    # sizes, and what is compiled in
    N, K: tl.constexpr, label_smoothing: tl.constexpr, SOFT: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes ROWS whole rows. K is a constant, so that the compiler knows how rows are aligned."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)[None, :]
    at = n[:, None] * K + k
    inside = (n < N)[:, None] & (k < K)
    x = tl.load(logits + at, mask=inside, other=-float("inf")).to(tl.float32)
    if SOFT:
        target = tl.load(targets + at, mask=inside, other=0.0)
        label = tl.argmax(target, 1)
        q = (1 - label_smoothing) * target + label_smoothing / K
        weight = (1 - label_smoothing) * tl.sum(target, 1) + label_smoothing
        valid = label < K
    else:
        label = tl.load(targets + n, mask=n < N, other=0)
        valid = (label >= 0) & (label < K)
        if share is None:
            label = label.to(tl.int32)
            q = tl.where(k == label[:, None], 1 - label_smoothing + label_smoothing / K, label_smoothing / K)
        else:
            other = tl.load(targets + (N - 1 - n), mask=n < N, other=0)
            valid = valid & (other >= 0) & (other < K)
            label, other, part = label.to(tl.int32), other.to(tl.int32), tl.load(share)
            q = tl.where(k == label[:, None], part, 0.0) + tl.where(k == other[:, None], 1 - part, 0.0)
            q = (1 - label_smoothing) * q + label_smoothing / K
            label = tl.where(part >= 0.5, label, other)
        weight = 1.0
    y = tl.load(logits + n * K + label, mask=(n < N) & valid, other=0.0).to(tl.float32)

    largest = tl.max(x, 1)
    shifted = x - largest[:, None]
    exp = tl.exp(shifted)
    total = tl.sum(exp, 1)
    total = tl.where(valid, total, float("nan"))  # and with it the loss and the gradient
    if SOFT or label_smoothing > 0 or share is not None:
        loss = tl.sum(tl.where(inside, q * (tl.log(total)[:, None] - shifted), 0.0), 1)
    else:
        loss = tl.log(total) - (y - largest)  # no sum: 0 times the infinity of a masked class would be NaN

    ahead = (x > y[:, None]) | ((x == y[:, None]) & (k < label[:, None]))
    rank = tl.sum(tl.where(x == -float("inf"), 5, ahead.to(tl.int32)), 1) - 5 * (BLOCK_K - K)
    known = loss == loss  # not NaN: a NaN, an inf or a row of -inf among the logits, or no such class
    tl.store(rows + n * 3, loss, mask=n < N)
    tl.store(rows + n * 3 + 1, ((rank < 1) & known).to(tl.float32), mask=n < N)
    tl.store(rows + n * 3 + 2, ((rank < 5) & known).to(tl.float32), mask=n < N)

    scale = tl.load(loss_scale) / N
    d = exp * (weight / total * scale)[:, None] - q * scale
    tl.store(gradient + at, d.to(gradient.dtype.element_ty), mask=inside)


def configured(logits: Tensor, soft: bool) -> Configuration:
    """Returns a warp for 1024 values of a row of logits, (N, K), so that few warps wait for others to sum."""
    classes = logits.shape[1]
    block = next_power_of_2(classes)
    computed = {"ROWS": min(max(1, 512 // block), 32), "num_warps": max(1, block // 1024)}
    key = f"{dtype_name(logits.dtype)} K={classes}{' soft' if soft else ''}"
    return configuration("cross_entropy", key, logits.device, computed)


@operator("cross_entropy")
def cross_entropy(
    logits: Tensor, targets: Tensor, loss_scale: Tensor, label_smoothing: float = 0.0, share: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns softmax cross-entropy and hits per row, and the gradient of loss_scale times the mean loss.

    logits: (N, K), fp16, bf16 or fp32, contiguous, K at most 32 768. targets: int64 (N,), classes from 0 to K - 1, or
    fp32 (N, K), soft targets. loss_scale: (1,), fp32. label_smoothing: in [0, 1). share: of a mixed batch, (1,), fp32,
    the weight of a row's own class; that of the batch in reverse order has the rest. The loss is that of
    torch.nn.functional.cross_entropy, infinities and NaN included, but there is no ignored class: a class that does
    not exist makes its row's loss and gradient NaN, so that the step is skipped and the loss shows it.

    Returns rows, (N, 3), fp32: loss, top-1 hit, top-5 hit (1 or 0; of soft targets the first of the largest is the
    label, of a mixed batch the class with the larger share, of equal ones the row's own); and the gradient, (N, K), in
    the logits' dtype, for `logits.backward(gradient)`. The losses, rows[:, 0], are differentiable too, through that
    gradient divided by loss_scale / N: what overflowed or underflowed in the logits' dtype stays so. Raises ValueError
    for other shapes, layouts, dtypes, devices or values.
    """
    n, classes = check(logits, targets, loss_scale, label_smoothing, share)
    if not runs_triton(logits.device):
        return reference(logits, targets, loss_scale, label_smoothing, share)
    rows = torch.empty((n, 3), dtype=torch.float32, device=logits.device)
    gradient = torch.empty_like(logits)
    soft = targets.dim() == 2
    config = configured(logits, soft)
    launch(
        kernel,
        (cdiv(n, config["ROWS"]),),
        logits,
        targets,
        loss_scale,
        share,
        rows,
        gradient,
        n,
        K=classes,
        label_smoothing=label_smoothing,
        SOFT=soft,
        BLOCK_K=next_power_of_2(classes),
        **config,
    )
    return rows, gradient


def check(
    logits: Tensor, targets: Tensor, loss_scale: Tensor, label_smoothing: float, share: Tensor | None
) -> tuple[int, int]:
    """Returns N and K. Raises ValueError unless all is as `cross_entropy` says; the reference takes fp64, too."""
    op, device = "cross_entropy", logits.device
    dtypes = HALF_AND_SINGLE if runs_triton(device) else (*HALF_AND_SINGLE, torch.float64)
    if logits.dtype not in dtypes:
        raise ValueError(f"{op}: logits must be one of {', '.join(map(str, dtypes))}, got {logits.dtype}")
    if logits.dim() != 2 or 0 in logits.shape or not logits.is_contiguous():
        raise ValueError(
            f"{op}: logits must be (N, K), neither of them 0, contiguous; "
            f"got {tuple(logits.shape)}, strides {logits.stride()}"
        )
    n, classes = logits.shape
    if classes > MAX_CLASSES:
        raise ValueError(f"{op}: logits must have at most {MAX_CLASSES} classes, got {classes}")
    if targets.is_floating_point():
        check_tensors(op, device, single_or_double(logits), targets=(targets, (n, classes)))
    else:
        check_tensors(op, device, torch.int64, targets=(targets, (n,)))
    check_tensors(op, device, torch.float32, loss_scale=(loss_scale, (1,)), share=(share, (1,)))
    if share is not None and targets.is_floating_point():
        raise ValueError(f"{op}: share is for classes: soft targets are mixed before")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must be at least 0 and below 1, got {label_smoothing}")
    return n, classes


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[2])
    ctx.mark_non_differentiable(output[1])


@once_differentiable
def backward(ctx, d_rows, _):
    gradient, loss_scale = ctx.saved_tensors
    d_logits = gradient * (d_rows[:, :1] * (len(gradient) / loss_scale))
    return d_logits.to(gradient.dtype), None, None, None, None


cross_entropy.register_autograd(backward, setup_context=setup_context)
