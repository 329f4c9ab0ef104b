"""A run does what the flags say."""

import pytest
import torch

from nvcnn.distributed import Transport
from nvcnn.program import Launch
from nvcnn.settings import Settings
from nvcnn.train import Run


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
