"""x[n, c, h, w] = images[n, h, w', c] scale[c] + shift[c], w' = W - 1 - w in a mirrored image: pixels to input.

In fp32, then cast. Channels beyond the three of the image are zero, for tensor cores, which take 4 or 8.

Bytes: 1 per value read, 2 per fp16 value written.
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


def reference(images, flip, scale, shift, dtype, channels=3):
    """Returns the formula in plain PyTorch, a row of pixels at a time: long inner loops."""
    n, h, w, c = images.shape
    either = torch.arange(n, device=images.device) + n * flip  # whole images: torch.where would choose byte by byte
    x = torch.cat([images, images.flip(2)]).index_select(0, either).view(n, h, w * c).to(torch.float32)
    scale, shift = scale.expand(w, c).flatten(), shift.expand(w, c).flatten()
    x = torch.addcmul(shift, x, scale, out=x).to(dtype).view(n, h, w, c)
    return (x if channels == c else F.pad(x, (0, channels - c))).permute(0, 3, 1, 2)


@triton.jit(repr=named("prepare_input"))
def kernel(
    images, flip, scale, shift, x, H,
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
    value = tl.load(images + row * (W * 3) + pixel[None, :], mask=inside & (c < 3)[None, :], other=0).to(tl.float32)
    value = value * factor[None, :] + offset[None, :]
    tl.store(x + row * (W * CHANNELS) + column[None, :], value.to(x.dtype.element_ty), mask=inside)


def configured(x: Tensor) -> Configuration:
    """Returns 8 values of x, 16 bytes of fp16, a thread and row; four rows, few columns idle."""
    columns = x.shape[1] * x.shape[3]
    block = min(next_power_of_2(columns), min((256, 128), key=lambda block: cdiv(columns, block) * block))
    computed = {"ROWS": 4096 // block, "BLOCK": block, "num_warps": 4}
    return configuration("prepare_input", f"{dtype_name(x.dtype)} W={x.shape[3]} C={x.shape[1]}", x.device, computed)


def write(images: Tensor, flip: Tensor, scale: Tensor, shift: Tensor, x: Tensor) -> None:
    n, channels, h, w = x.shape
    config = configured(x)
    grid = (n, cdiv(h, config["ROWS"]), cdiv(w * channels, config["BLOCK"]))
    launch(kernel, grid, images, flip, scale, shift, x, h, w, channels, **config)


@operator("prepare_input")
def prepare_input(
    images: Tensor, flip: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, channels: int = 3
) -> Tensor:
    """Returns the network's input: mirrored where `flip`, scaled and shifted in fp32, cast to `dtype`.

    images: (N, H, W, 3) uint8, contiguous. flip: (N,) bool. scale, shift: (3,) fp32. dtype: fp16, bf16 or fp32.
    channels: 3, 4 or 8. Returns (N, channels, H, W), channels-last. Raises ValueError for anything else.
    """
    check(images, flip, scale, shift, dtype, channels)
    if not runs_triton(images.device):
        return reference(images, flip, scale, shift, dtype, channels)
    n, h, w, _ = images.shape
    x = torch.empty((n, channels, h, w), dtype=dtype, device=images.device, memory_format=torch.channels_last)
    write(images, flip, scale, shift, x)
    return x


@operator("prepare_input_into", mutates_args=("x",))
def prepare_input_into(images: Tensor, flip: Tensor, scale: Tensor, shift: Tensor, x: Tensor) -> None:
    """Writes what `prepare_input` returns to x, (N, channels, H, W), channels-last."""
    check_into(images, flip, scale, shift, x)
    if runs_triton(images.device):
        write(images, flip, scale, shift, x)
    else:
        x.copy_(reference(images, flip, scale, shift, x.dtype, x.shape[1]))


def check(images: Tensor, flip: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, channels: int) -> None:
    good = images.dtype == torch.uint8 and images.dim() == 4 and images.shape[3:] == (3,) and images.numel()
    if not (good and images.is_contiguous()):
        raise ValueError(
            "prepare_input: images must be (N, H, W, 3), none of them 0, torch.uint8, contiguous; "
            f"got {tuple(images.shape)}, {images.dtype}, strides {images.stride()}"
        )
    check_tensors("prepare_input", images.device, torch.bool, flip=(flip, (images.shape[0],)))
    check_tensors("prepare_input", images.device, torch.float32, scale=(scale, (3,)), shift=(shift, (3,)))
    if dtype not in HALF_AND_SINGLE or channels not in (3, 4, 8):
        raise ValueError(
            f"prepare_input: dtype must be one of {', '.join(map(str, HALF_AND_SINGLE))}, channels 3, 4 or 8; "
            f"got {dtype}, {channels}"
        )


def check_into(images: Tensor, flip: Tensor, scale: Tensor, shift: Tensor, x: Tensor) -> None:
    n, channels, h, w = check_images("prepare_input", "x", x)
    check(images, flip, scale, shift, x.dtype, channels)
    if images.shape[:3] != (n, h, w) or x.device != images.device:
        raise ValueError(
            f"prepare_input: images must be ({n}, {h}, {w}, 3), on {x.device}, for x of {tuple(x.shape)}; "
            f"got {tuple(images.shape)}, on {images.device}"
        )
