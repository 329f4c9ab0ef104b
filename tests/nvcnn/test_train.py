"""A run does what the flags say, and goes on where it stopped."""

import signal
import threading

import pytest
import torch

from nvcnn import checkpoint
from nvcnn.distributed import Transport
from nvcnn.metrics import Metrics
from nvcnn.models import MODELS, Model, constant
from nvcnn.plan import find_training_data
from nvcnn.program import SAVED_AND_STOPPED, InputError, Launch
from nvcnn.settings import Settings
from nvcnn.step import Step
from nvcnn.train import Run, train
from tests.nvcnn.test_step import CLASSES, SIZE, Net
from tests.samples import write_folders


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
    whole = run(
        label_smoothing=0.1, normalize="imagenet", momentum_dtype="bf16", bf16=True, cutmix=0.5, accumulate=2, **flags
    )
    step, mixing = whole.train_step, whole.mixing
    optimizer, arena = step.optimizer, step.arena
    assert (mixing.mixup, mixing.cutmix, mixing.seed, mixing.rank) == (0.0, 0.5, 1, 0)
    assert (step.label_smoothing, step.prepare_input.keywords["normalize"]) == (0.1, "imagenet")
    assert (arena.momentum.dtype, step.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (optimizer.mode, optimizer.eta, optimizer.excluded_from) == ("scale", 0.01, arena.matrices)
    assert (step.accumulate, optimizer.ranks) == (2, 4)
    mixes = [batch.mix.tolist() for batch in whole.batches()]
    assert mixes == [pytest.approx(mixing.draw(number, 28, 28)) for number in (0, 1)]
    assert (float(optimizer.schedule[0]), optimizer.loss_scale.item()) == (0.5, 64.0)


def test_weights_are_those_of_the_seed_and_images_of_the_rank_too():
    first, second, other = run(), run(rank=1), run(seed=2)
    assert torch.equal(first.train_step.arena.weight, second.train_step.arena.weight)
    assert not torch.equal(first.train_step.arena.weight, other.train_step.arena.weight)
    images = [next(each.data).images for each in (first, second, other)]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("backend", [None, "torch"], ids=["synthetic", "torch"])
def test_a_run_goes_on_with_the_dropout_of_its_next_step(tmp_path, monkeypatch, small_dataset, backend):
    """The generators' state is in the checkpoint: bits are those of a run that nobody stopped. So are mixed batches."""
    monkeypatch.setitem(MODELS, "net", Model(lambda num_classes: Net(), SIZE, constant(0.1)))
    stop_at, whole = -1, Step.__call__

    def stopped(step, *batches):
        if int(step.optimizer.counters[0]) == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return whole(step, *batches)

    def trained(name) -> int:
        options = {"conv": "torch", "batch_size": 4, "num_batches": 4, "num_classes": CLASSES}
        options |= {"mixup": 0.2, "cutmix": 1.0, "accumulate": 2}
        data = {"data_dir": str(small_dataset), "data_backend": backend} if backend else {}
        settings = Settings(model="net", log_dir=str(tmp_path / name), **options, **data)
        dataset = find_training_data(settings)
        return Run(settings, dataset, Transport(Launch()), checkpoint.resume(settings, 1)).loop()

    monkeypatch.setattr(Step, "__call__", stopped)
    assert trained("whole") == 0
    stop_at = 1
    assert trained("stopped") == SAVED_AND_STOPPED
    assert trained("stopped") == 0
    one, other = (checkpoint.newest(tmp_path / name)[1] for name in ("whole", "stopped"))
    assert torch.equal(one["ranks"][0]["torch_rng"], other["ranks"][0]["torch_rng"])
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name


def test_a_run_does_not_go_on_with_other_classes(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "net", Model(lambda num_classes: Net(), SIZE, constant(0.1)))
    write_folders(tmp_path / "data", "train", images=CLASSES)
    options = {"data_dir": str(tmp_path / "data"), "batch_size": 2, "num_batches": 1, "log_dir": str(tmp_path / "run")}
    settings = Settings(model="net", conv="torch", **options)
    assert train(settings) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    (tmp_path / "data/train/n00000").rename(tmp_path / "data/train/n99999")
    with pytest.raises(InputError, match=r"its class 0 is 'n00001', but in .*run that is 'n00000': give its data"):
        train(settings)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}


class Gathering(Transport):
    """Is one of two ranks of one process; rank 0 gathers what rank 1 handed over before."""

    handed_over = None

    def gather(self, value):
        Gathering.handed_over, there = value if self.rank else None, Gathering.handed_over
        return [value, there]


def test_each_rank_goes_on_with_its_own_statistics(tmp_path, monkeypatch):
    """Their sums are formed about the running mean: about another one, they are rounded otherwise."""
    monkeypatch.setitem(MODELS, "net", Model(lambda num_classes: Net(), SIZE, constant(0.1)))
    options = {"model": "net", "conv": "torch", "batch_size": 4, "num_classes": CLASSES, "log_dir": str(tmp_path)}
    settings = Settings(**options)

    def runs(state) -> list[Run]:
        return [Run(settings, None, Gathering(Launch(2, rank, rank)), state) for rank in range(2)]

    before = runs(None)
    for each in reversed(before):
        each.train_step(next(each.data))
        each.save(Metrics("", steps=1, first_step=1, rank=each.transport.rank))
    _, state = checkpoint.newest(tmp_path)
    running = [each.train_step.arena.running for each in before]
    assert not torch.equal(*running)
    assert torch.equal(state["weights"]["bn.running_mean"], before[0].train_step.model.bn.running_mean)
    for each, own in zip(runs(state), running, strict=True):
        assert torch.equal(each.train_step.arena.running, own)
    for rank in state["ranks"]:
        del rank["running"]  # as an older one is, of which all ranks have rank 0's
    for each in runs(state):
        assert torch.equal(each.train_step.arena.running, running[0])


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
