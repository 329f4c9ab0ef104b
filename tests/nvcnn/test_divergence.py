"""A run that does not learn any more is noticed, by what the device says some steps later."""

import pytest
import torch

from nvcnn.divergence import Divergence
from tests.nvcnn.test_step import CLASSES, batch, make


@pytest.fixture
def step(device):
    return make(device)


def train(step, number, bad):
    data = batch(number, step.arena.weight.device)
    step(data._replace(labels=torch.full_like(data.labels, CLASSES)) if bad else data)  # no such class: NaN


def test_steps_that_are_skipped_in_a_row_are_counted(step):
    """One that is applied in between starts anew; what was copied is read once, and later."""
    divergence, reasons = Divergence(step.optimizer, max_skipped=3), []
    for number, bad in enumerate((1, 1, 0, 1, 1, 1, 0)):
        train(step, number, bad)
        divergence.follow()
        reasons.append(divergence.reason)
    assert not any(reasons[:6])
    assert reasons[6] == (
        "at step 6, learning rate 0.05625, loss scale 1: 3 steps in a row were skipped, since gradients were not finite"
    )
    divergence.look()
    assert divergence.reason == reasons[6]  # it stays
    assert divergence.good


def test_only_a_good_step_is_one_to_save(step):
    divergence, good = Divergence(step.optimizer, max_skipped=9), []
    for number, bad in enumerate((0, 1, 0)):
        train(step, number, bad)
        divergence.look()
        good.append(divergence.good)
    assert good == [True, False, True]
    assert divergence.reason == ""


def test_a_loss_that_is_not_finite_on_finite_gradients(step):
    divergence = Divergence(step.optimizer, max_skipped=9)
    train(step, 0, bad=False)
    step.optimizer.latest[0] = torch.inf
    divergence.look()
    assert divergence.reason.endswith(": the loss is inf, although gradients are finite")


def test_weights_that_are_not_finite(step):
    divergence = Divergence(step.optimizer, max_skipped=9)
    train(step, 0, bad=False)
    step.arena.weight[0] = torch.nan
    step.arena.refresh()
    divergence.look()
    assert divergence.reason == "after 1 steps: weights are not finite, or beyond 1e19"
