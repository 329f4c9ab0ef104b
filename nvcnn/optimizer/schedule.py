"""Learning rates: one number per step, computed once, so that the step itself only looks its number up."""

import torch
from torch import Tensor


def poly(learning_rate: float, steps: int, power: float = 2.0) -> Tensor:
    """learning_rate * (1 - step / steps) ** power, the original's schedule. Returns (steps,) fp32."""
    step = torch.arange(steps, dtype=torch.float64)
    return (learning_rate * (1 - step / steps) ** power).float()
