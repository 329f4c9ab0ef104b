"""--log_tensors writes the values of one step, although others have followed."""

import pytest
import torch

from nvcnn import plot
from nvcnn.metrics import Metrics, TensorLog
from tests.nvcnn.optimizer.test_larc import Training, batch

ETA = 0.003


@pytest.fixture
def training():
    return Training(mode="clip", eta=ETA, exclude="1d", loss_scale=8.0)


def written(log, log_dir, **options):
    shown = Metrics(str(log_dir), steps=9, first_step=0, rank=0)
    log.write(shown, **options)
    shown.close()
    return [e for e in plot.read(log_dir) if e["event"] == "tensors"]


def by_hand(training):
    """Returns ratio and norms per parameter for the gradients that are in the arena, in float64."""
    arena, values = training.arena, {}
    rate = training.optimizer.schedule[training.optimizer.counters[0]].item()
    for slot in arena.slots:
        weight = arena.view(arena.weight, slot).double()
        gradient = arena.gradient(slot).double() / 8 + 1e-4 * weight
        weight_norm, gradient_norm = weight.norm().item(), gradient.norm().item()
        included = weight.dim() >= 2 and weight_norm
        ratio = min(ETA * weight_norm / gradient_norm / rate, 1) if included else 1
        values[slot.name] = ratio, gradient_norm, weight_norm
    return values


def test_the_values_are_those_of_their_step(training, tmp_path, monkeypatch):
    log, expected = TensorLog(training.optimizer), []
    optimizer_step = training.optimizer.step

    def step():
        expected.append(by_hand(training))
        optimizer_step()

    monkeypatch.setattr(training.optimizer, "step", step)
    for number in (1, 2, 3):
        training.step(*batch(number))
        if number == 2:
            log.copy(2)
    assert expected[1] != expected[2]
    (event,) = written(log, tmp_path)
    assert event["step"] == 2
    for name, values in expected[1].items():
        got = [event[kind][name] for kind in ("trust_ratio", "gradient_norm", "weight_norm")]
        assert got == pytest.approx(values, rel=1e-5), name
    assert {event["trust_ratio"][name] for name in ("1.weight", "1.bias", "3.bias")} == {1}
    assert all(0 < event["trust_ratio"][name] < 1 for name in ("0.weight", "3.weight"))
    assert event["trust_ratio"].keys() == dict(training.model.named_parameters()).keys()


def test_a_step_is_written_once_and_nothing_before_the_first(training, tmp_path):
    log = TensorLog(training.optimizer)
    assert written(log, tmp_path) == []
    training.step(*batch(0))
    log.copy(1)
    assert len(written(log, tmp_path)) == 1
    assert len(written(log, tmp_path)) == 1


def test_an_overflow_is_null(training, tmp_path):
    x, y = batch(0)
    training.step(x * torch.nan, y)
    log = TensorLog(training.optimizer)
    log.copy(1)
    (event,) = written(log, tmp_path)
    assert event["gradient_norm"]["0.weight"] is None
    assert event["weight_norm"]["0.weight"] > 0


def test_tensorboard_gets_scalars_at_a_summary(training, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(Metrics, "summarize", lambda self, step, scalars: shown.append((step, scalars)))
    log = TensorLog(training.optimizer)
    for summarize in (False, True):
        training.step(*batch(0))
        log.copy(1 + summarize)
        written(log, tmp_path, summarize=summarize)
    ((step, scalars),) = shown
    assert step == 2
    assert len(scalars) == 3 * len(training.arena.slots)
    assert scalars["weight_norm/0.weight"] == training.optimizer.weight_norm[log.names.index("0.weight")].item()
