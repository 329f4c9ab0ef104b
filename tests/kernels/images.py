"""Channels-last tensors for tests, and the shapes that hypothesis draws: extremes one dimension at a time."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels.implementation import INTERPRETED

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32)
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149}  # above 0


def unit(dtype, implementation) -> float:
    """Returns the relative error of a rounding to `dtype`. To bf16 the interpreter cuts off; the compiler rounds."""
    if implementation == "triton" and INTERPRETED and dtype == torch.bfloat16:
        return 2.0**-7
    return {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}[dtype]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def on(x: Tensor, device) -> Tensor:
    """Returns x on the device with the strides that it has, where `Tensor.to` closes gaps and copies repetitions."""
    whole = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def randn(shape, dtype, device) -> Tensor:
    return channels_last(torch.randn(shape, device=device).to(dtype))


def integers(shape, dtype, device, low=-8, high=8) -> Tensor:
    return channels_last(torch.randint(low, high + 1, shape, device=device).to(dtype))


def slice_of(whole: Tensor, x: Tensor, first: int) -> Tensor:
    """Returns the slice of the channels of `whole` from `first` on, with the values of x."""
    return whole[:, first : first + x.shape[1]].copy_(x)


def poisoned(x: Tensor, channels: int) -> Tensor:
    """Returns a channels-last tensor like x with so many channels: all NaN."""
    n, _, h, w = x.shape
    return channels_last(x.new_full((n, channels, h, w), torch.nan))


SLICES = [(128, 64, 32), (72, 24, 8), (45, 20, 7)]  # pitches, channels and the first; the last is nowhere aligned
VALUES = 2**12  # so many that every dimension has several blocks; more take the interpreter long
MIDDLING = st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 7), st.integers(1, 7))
WIDE = st.tuples(st.just(2), st.integers(41, 400), st.integers(1, 3), st.integers(1, 3))
LARGE = st.tuples(st.just(1), st.integers(1, 5), st.integers(10, 32), st.integers(10, 32))
MANY = st.tuples(st.integers(5, 70), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3))
SHAPES = st.one_of(MIDDLING, WIDE, LARGE, MANY).filter(lambda s: torch.Size(s).numel() <= VALUES)
