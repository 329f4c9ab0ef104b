"""The table of learning rates has the shapes that others define."""

import numpy
import pytest
import torch
from torch.optim import lr_scheduler

from nvcnn.optimizer.schedule import learning_rates, poly
from nvcnn.settings import SCHEDULES

STEPS = 90


def torchs(scheduler, steps=STEPS, **options) -> torch.Tensor:
    """Returns the learning rates of a scheduler of PyTorch's, from 2."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    scheduler = scheduler(optimizer, **options)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates)


def test_poly_is_the_originals_schedule():
    step = torch.arange(1000, dtype=torch.float64)
    assert torch.equal(poly(2.0, 1000), (2.0 * (1 - step / 1000) ** 2.0).float())


@pytest.mark.parametrize(
    ("schedule", "warmup", "scheduler", "options"),
    [
        ("poly", 0, lr_scheduler.PolynomialLR, {"total_iters": STEPS, "power": 2.0}),
        ("cosine", 0, lr_scheduler.CosineAnnealingLR, {"T_max": STEPS}),
        ("step", 0, lr_scheduler.MultiStepLR, {"milestones": [30, 60, 80]}),
        # Its last step has a rate of 0, and its first nearly so.
        (
            *("onecycle", 27, lr_scheduler.OneCycleLR),
            {"total_steps": STEPS + 1, "pct_start": 28 / 91, "anneal_strategy": "linear"}
            | {"max_lr": 2.0, "div_factor": 1e30, "cycle_momentum": False},
        ),
    ],
)
def test_schedules_are_pytorchs(schedule, warmup, scheduler, options):
    torch.testing.assert_close(learning_rates(schedule, 2.0, STEPS, warmup), torchs(scheduler, **options))


def test_the_warm_up_is_pytorchs():
    for schedule in ("poly", "cosine", "onecycle"):
        rates = learning_rates(schedule, 2.0, STEPS, warmup=40)
        rise = torchs(lr_scheduler.LinearLR, steps=40, start_factor=1e-30, total_iters=40)
        torch.testing.assert_close(rates[:40], rise)
        assert torch.equal(rates[40:], learning_rates(schedule, 2.0, STEPS - 40))  # the rest of the run, whole
    rates, cold = (learning_rates("step", 2.0, STEPS, warmup) for warmup in (5, 0))
    assert torch.equal(rates[5:], cold[5:])


def test_onecycle_with_two_epochs_of_warm_up_is_that_of_ffcv():
    """Its `get_lr` interpolates between epochs (0, 2, all), its loop between the steps of an epoch."""
    epochs, steps_per_epoch = 16, 37
    ends = numpy.interp(numpy.arange(epochs + 1), [0, 2, epochs], [0, 1.7, 0])
    steps = numpy.arange(steps_per_epoch)
    expected = [numpy.interp(steps, [0, steps_per_epoch], ends[epoch : epoch + 2]) for epoch in range(epochs)]
    rates = learning_rates("onecycle", 1.7, epochs * steps_per_epoch, 2 * steps_per_epoch)
    torch.testing.assert_close(rates, torch.tensor(numpy.concatenate(expected)).float())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 0.3, 99.5, 1000])
def test_a_table_of_several_pieces_is_the_same(monkeypatch, schedule, warmup):
    whole, _ = learning_rates(schedule, 2.0, 1000, warmup), monkeypatch.setattr("nvcnn.optimizer.schedule.PIECE", 64)
    rates = learning_rates(schedule, 2.0, 1000, warmup)
    assert torch.equal(rates, whole)
    assert (rates.dtype, rates.shape) == (torch.float32, (1000,))
    assert rates.isfinite().all()
    assert rates[-1] > 0


def test_refuses_an_unknown_schedule():
    with pytest.raises(ValueError, match="got linear"):
        learning_rates("linear", 1.0, 10)
