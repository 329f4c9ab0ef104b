"""The tensors that ops are given and make: what is refused, dtypes of sums, and room for results."""

import torch
from torch import Tensor

from kernels.implementation import runs_triton
from kernels.launch import state

HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def pitch_of(x: Tensor) -> int | None:
    """Returns how many values lie from a pixel to the next: C of a channels-last tensor, more of a slice of one.

    None in any other layout.
    """
    n, c, h, w = x.shape
    of_n, of_c, of_h, of_w = x.stride()
    pitch = of_w if w > 1 else of_h if h > 1 else of_n if n > 1 else c
    expected = (n, h * w * pitch, of_n), (c, 1, of_c), (h, w * pitch, of_h)
    return pitch if pitch >= c and all(stride == right for size, right, stride in expected if size > 1) else None


def check_images(
    op: str, name: str, x: Tensor, *, like: Tensor | None = None, slices: bool = False
) -> tuple[int, int, int, int]:
    """Returns N, C, H, W. Raises ValueError unless `x` is channels-last, with four dimensions, none of them 0.

    fp16, bf16 or fp32; fp64 too where the reference runs. `like`: it must have the shape, dtype and device of that one.
    `slices`: it may be a slice of the channels of a channels-last tensor.
    """
    if x.dtype not in HALF_AND_SINGLE and (x.dtype != torch.float64 or runs_triton(x.device)):
        dtypes = HALF_AND_SINGLE if runs_triton(x.device) else (*HALF_AND_SINGLE, torch.float64)
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, dtypes))}, got {x.dtype}")
    if x.dim() != 4 or 0 in x.shape:
        raise ValueError(f"{op}: {name} must be (N, C, H, W), none of them 0, got {tuple(x.shape)}")
    # Without memory PyTorch's own convolutions lose the layout.
    whole = state.silent or x.is_contiguous(memory_format=torch.channels_last)
    if not (whole or (slices and pitch_of(x))):
        raise ValueError(
            f"{op}: {name} must be channels-last{' or a slice of such channels' * slices}, "
            f"got strides {x.stride()} for {tuple(x.shape)}: "
            "make it so once, with .contiguous(memory_format=torch.channels_last)"
        )
    if like is not None and (x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device):
        raise ValueError(
            f"{op}: {name} must be {tuple(like.shape)}, {like.dtype}, on {like.device}; "
            f"got {tuple(x.shape)}, {x.dtype}, on {x.device}"
        )
    n, c, h, w = x.shape
    return n, c, h, w


def check_weight(op: str, name: str, weight: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """Raises ValueError unless it is (K, C / groups, R, S), channels-last, of one of the dtypes, on that device."""
    check_images(op, name, weight)
    if weight.dtype not in dtypes or weight.device != device:
        raise ValueError(
            f"{op}: {name} must be {' or '.join(map(str, dtypes))}, on {device}; got {weight.dtype}, on {weight.device}"
        )


def check_like(op: str, like: Tensor, /, **others: Tensor | None) -> None:
    """Raises ValueError for the first of the others that has not the shape, dtype, layout and device of `like`."""
    for name, tensor in others.items():
        if tensor is not None:
            check_images(op, name, tensor, like=like)


def check_tensors(
    op: str,
    device: torch.device,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    /,
    **expected: tuple[Tensor | None, tuple[int, ...]],
) -> None:
    """Raises ValueError for the first tensor that is not contiguous, of its shape, of (one of) `dtype`, on `device`."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        good = tensor.shape == shape and tensor.dtype in dtypes and tensor.device == device
        if not (good and tensor.is_contiguous()):
            raise ValueError(
                f"{op}: {name} must be {shape}, {' or '.join(map(str, dtypes))}, contiguous, on {device}; "
                f"got {tuple(tensor.shape)}, {tensor.dtype}, strides {tensor.stride()}, on {tensor.device}"
            )


def check_together(op: str, /, **tensors: Tensor | None) -> None:
    """Raises ValueError if some of them are given and others not."""
    missing = [name for name, tensor in tensors.items() if tensor is None]
    if missing and len(missing) < len(tensors):
        raise ValueError(f"{op}: {', '.join(tensors)} come together or not at all; got no {' and no '.join(missing)}")


def single_or_double(x: Tensor) -> torch.dtype:
    """Returns the dtype of sums over `x` and of parameters of one dimension: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_images(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Returns a new tensor of that shape, channels-last, of this dtype, or that of x, and on the device of x."""
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)
