"""y[n, c] = mean of x[n, c] over H and W, and dx[n, c, h, w] = dy[n, c] / (H W): the pooling before the classifier.

Lin, Chen and Yan 2013, "Network In Network", arXiv:1312.4400, section 3.2. Sums are fp32, in one fixed order.

Bytes: forward reads x, writes N C values; backward reads N C values, writes dx. 2 per fp16 value of x each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import check_images, empty_images
from kernels.configurations import Configuration, cdiv, configuration, dtype_name, next_power_of_2
from kernels.implementation import runs_triton
from kernels.launch import launch
from kernels.operators import named, operator


def reference(x):
    """Returns (N, C) for (N, C, H, W), channels-last, in plain PyTorch."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


def backward_reference(dy, height, width):
    """Returns dx, (N, C, H, W), channels-last, in plain PyTorch."""
    n, c = dy.shape
    return (dy / (height * width)).view(n, 1, 1, c).repeat(1, height, width, 1).permute(0, 3, 1, 2)


@triton.jit(repr=named("global_average"))
def kernel(x, y, C, PIXELS, inverse, BLOCK_C: tl.constexpr, BLOCK_PIXELS: tl.constexpr):
    """One program computes BLOCK_C channels of one image."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = tl.arange(0, BLOCK_PIXELS)
    total = tl.zeros((BLOCK_PIXELS, BLOCK_C), tl.float32)
    for first in range(0, PIXELS, BLOCK_PIXELS):
        at = (first + pixel)[:, None]
        inside = (at < PIXELS) & (c < C)[None, :]
        total += tl.load(x + (n * PIXELS + at) * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) * inverse
    tl.store(y + n * C + c, mean.to(y.dtype.element_ty), mask=c < C)


@triton.jit(repr=named("global_average_backward"))
def backward_kernel(dy, dx, C, PIXELS, inverse, BLOCK_C: tl.constexpr, BLOCK_PIXELS: tl.constexpr):
    """One program computes BLOCK_C channels of one image."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = tl.arange(0, BLOCK_PIXELS)
    gradient = tl.load(dy + n * C + c, mask=c < C).to(tl.float32) * inverse
    gradient = tl.broadcast_to(gradient.to(dx.dtype.element_ty)[None, :], (BLOCK_PIXELS, BLOCK_C))
    for first in range(0, PIXELS, BLOCK_PIXELS):
        at = (first + pixel)[:, None]
        tl.store(dx + (n * PIXELS + at) * C + c[None, :], gradient, mask=(at < PIXELS) & (c < C)[None, :])


def configured(x: Tensor) -> Configuration:
    """Returns 8 values of x, 16 bytes of fp16, a thread, and as many pixels as fill the program's 4 warps."""
    c, pixels = x.shape[1], x.shape[2] * x.shape[3]
    block_c = min(next_power_of_2(c), 128)
    computed = {"BLOCK_C": block_c, "BLOCK_PIXELS": max(1, 1024 // block_c), "num_warps": 4}
    return configuration("global_average", f"{dtype_name(x.dtype)} C={c} HW={pixels}", x.device, computed)


@operator("global_average")
def global_average(x: Tensor) -> Tensor:
    """Returns the mean over H and W, differentiable.

    x: (N, C, H, W), fp16, bf16 or fp32, channels-last. Returns (N, C) in x's dtype. Raises ValueError for another
    layout, shape or dtype.
    """
    n, c, h, w = check_images("global_average", "x", x)
    if not runs_triton(x.device):
        return reference(x)
    y = torch.empty((n, c), dtype=x.dtype, device=x.device)
    config = configured(x)
    launch(kernel, (n, cdiv(c, config["BLOCK_C"])), x, y, c, h * w, 1 / (h * w), **config)
    return y


@operator("global_average_backward")
def global_average_backward(dy: Tensor, height: int, width: int) -> Tensor:
    """Returns dx, (N, C, height, width), channels-last, for dy, (N, C)."""
    n, c = dy.shape
    if not runs_triton(dy.device):
        return backward_reference(dy, height, width)
    dx = empty_images(dy, (n, c, height, width))
    config = configured(dx)
    grid = (n, cdiv(c, config["BLOCK_C"]))
    launch(backward_kernel, grid, dy.contiguous(), dx, c, height * width, 1 / (height * width), **config)
    return dx


def setup_context(ctx, inputs, output):
    ctx.size = inputs[0].shape[2:]


def backward(ctx, dy):
    return global_average_backward(dy, *ctx.size)


global_average.register_autograd(backward, setup_context=setup_context)
