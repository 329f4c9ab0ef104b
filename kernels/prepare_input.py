"""x[n, c, h, w] = images[n, h, w', c] scale[c] + shift[c], w' = W - 1 - w in a mirrored image: pixels to input.

In fp32, then cast. Channels beyond the three of the image are zero, for tensor cores, which take 4 or 8.

Images may be mixed with those of the batch in reverse order, each mirrored before by its own flip: a pixel then is
weight own + (1 - weight) other (mixup: Zhang et al. 2017, arXiv:1710.09412), and in a box it is the other's (CutMix:
Yun et al. 2019, arXiv:1905.04899).

Bytes: 1 per value read, 2 per fp16 value written. A mixed value reads another byte, unless the weight is 0 or 1.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import HALF_AND_SINGLE, check_images, check_tensors
from kernels.configurations import Configuration, cdiv, configuration, dtype_name, next_power_of_2
from kernels.implementation import runs_triton
from kernels.launch import launch
from kernels.operators import named, operator


def reference(images, flip, scale, shift, dtype, channels=3, mix=None):
    """Returns the formula in plain PyTorch, a row of pixels at a time: long inner loops."""
    n, h, w, c = images.shape
    either = torch.arange(n, device=images.device) + n * flip  # whole images: torch.where would choose byte by byte
    x = torch.cat([images, images.flip(2)]).index_select(0, either).view(n, h, w * c).to(torch.float32)
    if mix is not None:
        weight, top, bottom, left, right = mix
        rows, columns = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
        box = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
        weight = torch.where(box, 0, weight).repeat_interleave(c, 1)
        x = torch.addcmul(x * weight, x.flip(0), 1 - weight)
    scale, shift = scale.expand(w, c).flatten(), shift.expand(w, c).flatten()
    x = torch.addcmul(shift, x, scale, out=x).to(dtype).view(n, h, w, c)
    return (x if channels == c else F.pad(x, (0, channels - c))).permute(0, 3, 1, 2)


@triton.jit(repr=named("prepare_input"))
def kernel(
    images, flip, scale, shift, mix, x, H,
    W: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK of the W x CHANNELS values in ROWS rows of one image."""
    n = tl.program_id(0).to(tl.int64)
    row = (n * H + tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    w, c = column // CHANNELS, column % CHANNELS
    pixel = tl.where(tl.load(flip + n), W - 1 - w, w) * 3 + c
    factor = tl.load(scale + c, mask=c < 3, other=0.0)
    offset = tl.load(shift + c, mask=c < 3, other=0.0)
    inside = (row < (n + 1) * H) & (column < W * CHANNELS)[None, :]
    known = inside & (c < 3)[None, :]
    if mix is None:
        value = tl.load(images + row * (W * 3) + pixel[None, :], mask=known, other=0).to(tl.float32)
    else:
        h = row - n * H
        box = (h >= tl.load(mix + 1)) & (h < tl.load(mix + 2))
        box = box & ((w >= tl.load(mix + 3)) & (w < tl.load(mix + 4)))[None, :]
        weight = tl.where(box, 0.0, tl.load(mix))
        m = tl.num_programs(0) - 1 - n
        at = (row + (m - n) * H) * (W * 3) + (tl.where(tl.load(flip + m), W - 1 - w, w) * 3 + c)[None, :]
        own = tl.load(images + row * (W * 3) + pixel[None, :], mask=known & (weight != 0), other=0)
        other = tl.load(images + at, mask=known & (weight != 1), other=0)
        value = weight * own.to(tl.float32) + (1 - weight) * other.to(tl.float32)
    value = value * factor[None, :] + offset[None, :]
    tl.store(x + row * (W * CHANNELS) + column[None, :], value.to(x.dtype.element_ty), mask=inside)


def configured(x: Tensor) -> Configuration:
    """Returns 8 values of x, 16 bytes of fp16, a thread and row; four rows, few columns idle."""
    columns = x.shape[1] * x.shape[3]
    block = min(next_power_of_2(columns), min((256, 128), key=lambda block: cdiv(columns, block) * block))
    computed = {"ROWS": 4096 // block, "BLOCK": block, "num_warps": 4}
    return configuration("prepare_input", f"{dtype_name(x.dtype)} W={x.shape[3]} C={x.shape[1]}", x.device, computed)


def write(images: Tensor, flip: Tensor, scale: Tensor, shift: Tensor, mix: Tensor | None, x: Tensor) -> None:
    n, channels, h, w = x.shape
    config = configured(x)
    grid = (n, cdiv(h, config["ROWS"]), cdiv(w * channels, config["BLOCK"]))
    launch(kernel, grid, images, flip, scale, shift, mix, x, h, w, channels, **config)


@operator("prepare_input")
def prepare_input(
    images: Tensor,
    flip: Tensor,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
    channels: int = 3,
    mix: Tensor | None = None,
) -> Tensor:
    """Returns the network's input: mirrored where `flip`, scaled and shifted in fp32, cast to `dtype`.

    images: (N, H, W, 3) uint8, contiguous. flip: (N,) bool. scale, shift: (3,) fp32. dtype: fp16, bf16 or fp32.
    channels: 3, 4 or 8. mix: (5,) fp32, the weight of an image's own pixels, and the box of the other's: its first row,
    the first below it, its first column, the first right of it; None mixes nothing. Returns (N, channels, H, W),
    channels-last. Raises ValueError for anything else.
    """
    check(images, flip, scale, shift, dtype, channels, mix)
    if not runs_triton(images.device):
        return reference(images, flip, scale, shift, dtype, channels, mix)
    n, h, w, _ = images.shape
    x = torch.empty((n, channels, h, w), dtype=dtype, device=images.device, memory_format=torch.channels_last)
    write(images, flip, scale, shift, mix, x)
    return x


@operator("prepare_input_into", mutates_args=("x",))
def prepare_input_into(
    images: Tensor, flip: Tensor, scale: Tensor, shift: Tensor, x: Tensor, mix: Tensor | None = None
) -> None:
    """Writes what `prepare_input` returns to x, (N, channels, H, W), channels-last."""
    check_into(images, flip, scale, shift, x, mix)
    if runs_triton(images.device):
        write(images, flip, scale, shift, mix, x)
    else:
        x.copy_(reference(images, flip, scale, shift, x.dtype, x.shape[1], mix))


def check(
    images: Tensor,
    flip: Tensor,
    scale: Tensor,
    shift: Tensor,
    dtype: torch.dtype,
    channels: int,
    mix: Tensor | None,
) -> None:
    good = images.dtype == torch.uint8 and images.dim() == 4 and images.shape[3:] == (3,) and images.numel()
    if not (good and images.is_contiguous()):
        raise ValueError(
            "prepare_input: images must be (N, H, W, 3), none of them 0, torch.uint8, contiguous; "
            f"got {tuple(images.shape)}, {images.dtype}, strides {images.stride()}"
        )
    check_tensors("prepare_input", images.device, torch.bool, flip=(flip, (images.shape[0],)))
    check_tensors(
        "prepare_input", images.device, torch.float32, scale=(scale, (3,)), shift=(shift, (3,)), mix=(mix, (5,))
    )
    if dtype not in HALF_AND_SINGLE or channels not in (3, 4, 8):
        raise ValueError(
            f"prepare_input: dtype must be one of {', '.join(map(str, HALF_AND_SINGLE))}, channels 3, 4 or 8; "
            f"got {dtype}, {channels}"
        )


def check_into(images: Tensor, flip: Tensor, scale: Tensor, shift: Tensor, x: Tensor, mix: Tensor | None) -> None:
    n, channels, h, w = check_images("prepare_input", "x", x)
    check(images, flip, scale, shift, x.dtype, channels, mix)
    if images.shape[:3] != (n, h, w) or x.device != images.device:
        raise ValueError(
            f"prepare_input: images must be ({n}, {h}, {w}, 3), on {x.device}, for x of {tuple(x.shape)}; "
            f"got {tuple(images.shape)}, on {images.device}"
        )
