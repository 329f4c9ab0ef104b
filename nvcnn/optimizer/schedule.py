"""Learning rates: one number per step, computed once, so that the step itself only looks its number up."""

import torch
from torch import Tensor

MOST_STEPS = 2**28  # their learning rates are a GiB
PIECE = 2**20  # steps that are computed at a time, in fp64


def poly(learning_rate: float, steps: int, power: float = 2.0) -> Tensor:
    """learning_rate * (1 - step / steps) ** power, the original's schedule. Returns (steps,) fp32."""
    rates = torch.empty(steps, dtype=torch.float32)
    for first in range(0, steps, PIECE):
        step = torch.arange(first, min(first + PIECE, steps), dtype=torch.float64)
        rates[first : first + PIECE] = learning_rate * (1 - step / steps) ** power
    return rates
