import pytest
import torch

from benchmarks import train_cpu
from benchmarks.step import LEARNING_RATE, plain_loop
from nvcnn.data.batch import prepare_input
from nvcnn.distributed import connect
from nvcnn.settings import Settings
from nvcnn.train import Run


def test_both_loops_take_as_many_batches_from_one_source():
    ours, theirs = [], []
    turns = train_cpu.Turns(iter(range(100)), theirs.append, steps=3)
    for _ in range(10):
        ours.append(next(turns))
    assert ours == [0, 1, 2, 6, 7, 8, 12, 13, 14, 18]
    assert theirs == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert len(turns.ours) == len(turns.theirs) == 3


def test_a_turn_is_charged_to_who_took_it(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def spend(seconds):
        clock[0] += seconds

    turns = train_cpu.Turns(iter(range(100)), lambda _: spend(0.010), steps=2)
    for _ in range(5):
        next(turns)
        spend(0.030)
    assert turns.ours == pytest.approx([30, 30])
    assert turns.theirs == pytest.approx([10, 10])


def test_compare_runs_the_whole_loop(monkeypatch):
    steps = []
    whole = Run.loop

    def loop(run):
        code = whole(run)
        steps.append(run.step)
        return code

    monkeypatch.setattr(Run, "loop", loop)
    row = train_cpu.compare("lenet", 4, bf16=False, data_dir=None, steps=2, turns=3)
    assert steps == [2 * 4 + 1]
    assert row["name"] == "training loop, lenet, batch 4, fp32, synthetic: nvcnn / bare PyTorch"
    assert row["ratio"] > 0


def test_the_bare_loop_computes_what_ours_does(device):
    """Same weights and batches give the same losses, so that the two speeds are of the same work."""
    run = Run(Settings(model="lenet", batch_size=8, learning_rate=LEARNING_RATE), None, connect("torch"), None)
    run.schedule.fill_(LEARNING_RATE)  # the bare loop's learning rate does not decay
    run.train_step.optimizer.schedule.fill_(LEARNING_RATE)
    bare = train_cpu.lenet(1000)
    state = {k: v.detach().cpu().clone() for k, v in run.train_step.model.state_dict().items()}
    # Ours flattens channels-last.
    state["fc1.weight"] = state["fc1.weight"].view(512, 7, 7, 64).permute(0, 3, 1, 2).reshape(512, -1)
    bare.load_state_dict(dict(zip(bare.state_dict(), state.values(), strict=True)))
    loop = plain_loop(bare, device=device, dtype=torch.float32)
    batch = next(run.data)
    images = prepare_input(batch.images, batch.flip, dtype=torch.float32, normalize="signed")
    losses = [(float(run.train_step(batch)[0]), float(loop(images, batch.labels))) for _ in range(6)]
    for ours, theirs in losses:
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert losses[-1][0] < losses[0][0]
