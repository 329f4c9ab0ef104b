"""Calls what there is for the same work: the project's kernels, and PyTorch's convolutions (cuDNN's on a GPU)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Step
from kernels.operators import operators

POINTWISE = ((1, 1), (0, 0))  # stride and padding of a 1 x 1 convolution


def present(op: str) -> Callable[..., Any]:
    """Returns the launcher of the project's op, since on tensors without memory the operator would launch nothing."""
    return operators[f"nvcnn::{op}"].launcher


def norm(channels: int, device: torch.device) -> Tensor:
    """Returns the norm, (5, channels), fp32, of a mean of 0 and a variance of 1, as `batch_norm_statistics` does."""
    return torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0], device=device)[:, None].repeat(1, channels)


def library(x: Tensor, weight: Tensor) -> Step:
    """Returns a step of the 1 x 1 convolution alone, by the fastest of the library's algorithms."""

    def step() -> Tensor:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            return F.conv2d(x, weight, None, *POINTWISE)

    return step


def library_gradients(g: Tensor, x: Tensor, weight: Tensor, *, of_weight: bool) -> Step:
    """Returns a step of the data gradient alone, or of both gradients, without BatchNorm or mask."""
    mask = [True, of_weight, False]

    def step() -> Any:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            return torch.ops.aten.convolution_backward(g, x, weight, None, *POINTWISE, [1, 1], False, [0, 0], 1, mask)

    return step
