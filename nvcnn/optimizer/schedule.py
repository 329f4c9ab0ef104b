"""Learning rates: one number per step, computed once, so that the step itself only looks its number up.

All begin with a linear warm-up from 0, which the first step has, to the learning rate, which the first step after it
has. With x from 0 at the end of the warm-up to 1 at the end of the run, of which the last step is just short:

    poly       (1 - x)^2, the original's
    cosine     (1 + cos(pi x)) / 2, without restarts (Loshchilov and Hutter 2017, arXiv:1608.03983)
    step       a tenth from 1/3, 2/3 and 8/9 of the run on: after 30, 60 and 80 of 90 epochs, as ResNets are trained
               classically (Goyal et al. 2017, arXiv:1706.02677); the warm-up counts as part of the run
    onecycle   1 - x: up and down on straight lines (Smith and Topin 2018, arXiv:1708.07120), with a warm-up of two
               epochs FFCV's schedule
"""

import math

import torch
from torch import Tensor

MOST_STEPS = 2**28  # their learning rates are a GiB
PIECE = 2**20  # steps that are computed at a time, in fp64
RISE = 0.3  # of a run: onecycle's warm-up by default, as torch.optim.lr_scheduler.OneCycleLR has it


def learning_rates(schedule: str, learning_rate: float, steps: int, warmup: float = 0.0) -> Tensor:
    """Returns (steps,) fp32. warmup: steps that the warm-up takes, at most all; they need not be a whole number."""
    rates = torch.empty(steps, dtype=torch.float32)
    for first in range(0, steps, PIECE):
        step = torch.arange(first, min(first + PIECE, steps), dtype=torch.float64)
        x = (step - warmup) / (steps - warmup)
        if schedule == "poly":
            rate = learning_rate * (1 - x) ** 2
        elif schedule == "cosine":
            rate = learning_rate * (1 + torch.cos(math.pi * x)) / 2
        elif schedule == "step":
            falls = torch.bucketize(9 * step, steps * torch.tensor([3.0, 6.0, 8.0]).double(), right=True)
            rate = learning_rate * 0.1 ** falls.double()
        elif schedule == "onecycle":
            rate = learning_rate * (1 - x)
        else:
            raise ValueError(f"schedule must be poly, cosine, step or onecycle, got {schedule}")
        rates[first : first + PIECE] = torch.where(step < warmup, learning_rate * step / warmup, rate)
    return rates


def poly(learning_rate: float, steps: int) -> Tensor:
    """Returns the original's schedule, (steps,) fp32."""
    return learning_rates("poly", learning_rate, steps)
