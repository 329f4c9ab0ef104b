"""Channels-last activations, as the ops on (N, C, H, W) take them, and the checks of what they are given."""

import torch
from torch import Tensor

from kernels.configurations import Configuration, cdiv
from kernels.implementation import runs_triton
from kernels.launch import state

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def check_images(op: str, name: str, x: Tensor, *, like: Tensor | None = None) -> tuple[int, int, int, int]:
    """N, C, H, W. ValueError unless `x` is a channels-last tensor of four dimensions without an empty one.

    fp16, bf16 or fp32; fp64 too where the reference runs. `like`: it must have the shape, dtype and device of that one.
    """
    if x.dtype not in HALF_AND_SINGLE and (x.dtype != torch.float64 or runs_triton(x.device)):
        dtypes = HALF_AND_SINGLE if runs_triton(x.device) else (*HALF_AND_SINGLE, torch.float64)
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, dtypes))}, got {x.dtype}")
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"{op}: {name} must be (N, C, H, W), none of them 0, got {tuple(x.shape)}")
    # Without memory PyTorch's own convolutions lose the layout.
    if not (state.silent or x.is_contiguous(memory_format=torch.channels_last)):
        raise ValueError(
            f"{op}: {name} must be channels-last, got strides {x.stride()} for {tuple(x.shape)}: "
            "make it so once, with .to(memory_format=torch.channels_last)"
        )
    if like is not None and (x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device):
        raise ValueError(
            f"{op}: {name} must be {tuple(like.shape)}, {like.dtype}, on {like.device}; "
            f"got {tuple(x.shape)}, {x.dtype}, on {x.device}"
        )
    n, c, h, w = x.shape
    return n, c, h, w


def empty_images(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A new tensor of that shape, channels-last, of the dtype and on the device of x."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def check_tensors(
    op: str, device: torch.device, dtype: torch.dtype, **expected: tuple[Tensor, tuple[int, ...]]
) -> None:
    """ValueError for the first tensor that is not contiguous, of its shape, of `dtype` and on `device`."""
    for name, (tensor, shape) in expected.items():
        good = tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
        if not (good and tensor.is_contiguous()):
            raise ValueError(
                f"{op}: {name} must be {shape}, {dtype}, contiguous, on {device}; "
                f"got {tuple(tensor.shape)}, {tensor.dtype}, strides {tensor.stride()}, on {tensor.device}"
            )


def single_or_double(x: Tensor) -> torch.dtype:
    """The dtype of sums over `x` and of parameters of one dimension: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def parts_of_rows(rows: int, channels: int, config: Configuration) -> tuple[int, int]:
    """How the rows of (N H W, C) are shared out for a sum over them: the number of parts, and rows a part.

    With a tile's channels they make about config["PROGRAMS"] programs; a part is whole tiles.
    """
    wanted = cdiv(config["PROGRAMS"], cdiv(channels, config["BLOCK_C"]))
    tiles = cdiv(rows, config["BLOCK_ROWS"])
    rows_a_part = cdiv(tiles, min(wanted, tiles)) * config["BLOCK_ROWS"]
    return cdiv(rows, rows_a_part), rows_a_part
