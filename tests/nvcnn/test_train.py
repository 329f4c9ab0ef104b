"""A run does what the flags say, and goes on where it stopped."""

import signal
import threading

import pytest
import torch

from nvcnn import checkpoint
from nvcnn.distributed import Transport
from nvcnn.models import MODELS, Model, constant
from nvcnn.program import SAVED_AND_STOPPED, Launch
from nvcnn.settings import Settings
from nvcnn.step import Step
from nvcnn.train import Run
from tests.nvcnn.test_step import CLASSES, SIZE, Net


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Keeps the number of threads that this process has: a run would set its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(rank: int = 0, **settings) -> Run:
    """Returns the run of one of two ranks. The other is not there, so they cannot agree on convolutions by time."""
    settings = {"model": "lenet", "conv": "torch", "batch_size": 2, "num_batches": 10, "num_classes": 9} | settings
    return Run(Settings(**settings), None, Transport(Launch(2, rank, rank)), None)


def test_flags_reach_the_step():
    flags = {"larc_mode": "scale", "larc_eta": 0.01, "larc_exclude": "1d", "loss_scale": 64.0, "learning_rate": 0.5}
    step = run(label_smoothing=0.1, normalize="imagenet", momentum_dtype="bf16", bf16=True, **flags).train_step
    optimizer, arena = step.optimizer, step.arena
    assert (step.label_smoothing, step.prepare_input.keywords["normalize"]) == (0.1, "imagenet")
    assert (arena.momentum.dtype, step.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (optimizer.mode, optimizer.eta, optimizer.excluded_from) == ("scale", 0.01, arena.matrices)
    assert (float(optimizer.schedule[0]), optimizer.loss_scale.item(), optimizer.ranks) == (0.5, 64.0, 2)


def test_weights_are_those_of_the_seed_and_images_of_the_rank_too():
    first, second, other = run(), run(rank=1), run(seed=2)
    assert torch.equal(first.train_step.arena.weight, second.train_step.arena.weight)
    assert not torch.equal(first.train_step.arena.weight, other.train_step.arena.weight)
    images = [next(each.data).images for each in (first, second, other)]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_a_run_goes_on_with_the_dropout_of_its_next_step(tmp_path, monkeypatch):
    """The generators' state is in the checkpoint: bits are those of a run that nobody stopped."""
    monkeypatch.setitem(MODELS, "net", Model(lambda num_classes: Net(), SIZE, constant(0.1)))
    stop_at, whole = -1, Step.__call__

    def stopped(step, batch):
        if int(step.optimizer.counters[0]) == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return whole(step, batch)

    def trained(name) -> int:
        options = {"conv": "torch", "batch_size": 4, "num_batches": 4, "num_classes": CLASSES}
        settings = Settings(model="net", log_dir=str(tmp_path / name), **options)
        return Run(settings, None, Transport(Launch()), checkpoint.resume(settings, 1)).loop()

    monkeypatch.setattr(Step, "__call__", stopped)
    assert trained("whole") == 0
    stop_at = 1
    assert trained("stopped") == SAVED_AND_STOPPED
    assert trained("stopped") == 0
    one, other = (checkpoint.newest(tmp_path / name)[1]["weights"] for name in ("whole", "stopped"))
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def test_a_run_that_waits_for_input_ends_at_a_signal(monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr("nvcnn.program.PATIENCE", 0.1)
    monkeypatch.setattr("nvcnn.program.abort", lambda code: ended.set())

    class Never:
        def __next__(self):
            signal.raise_signal(signal.SIGTERM)
            assert ended.wait(60)
            raise EOFError

    waiting = Run(Settings(model="lenet", conv="torch", batch_size=2), None, Transport(Launch()), None)
    waiting.data = Never()
    with pytest.raises(EOFError):
        waiting.loop()
    assert "ended by a signal while it waited for input, without saving" in capsys.readouterr().err
