"""Ranks that were given something else are refused before anything is written, in a line that says who and what."""

import hashlib
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from nvcnn import checkpoint, evaluate, plot, train
from nvcnn.check_ranks import LAG, WeightCheck, check_ranks, facts, who_differs
from nvcnn.data.dataset import find_dataset
from nvcnn.distributed import Transport
from nvcnn.program import InputError, Launch
from nvcnn.settings import Evaluation, Settings
from tests.nvcnn.checkpoints import state_of
from tests.nvcnn.test_step import make
from tests.samples import WRITERS

SETTINGS = Settings(model="lenet", data_dir="here", log_dir="run")
EVALUATION = Evaluation(data_dir="here", log_dir="run")


class WithAnother(Transport):
    """Is rank 0 of two. The other says what it is given here."""

    def __init__(self, other):
        super().__init__(Launch(2))
        self.other = other

    def gather(self, value):
        return [value, self.other if isinstance(value, dict) else hashlib.sha256(repr(self.other).encode()).digest()]


@pytest.mark.parametrize(
    ("settings", "other", "said"),
    [
        (SETTINGS, replace(SETTINGS, num_batches=8), "--num_batches is 8, on rank 0 50"),
        (SETTINGS, replace(SETTINGS, log_dir=""), "--log_dir is not given, on rank 0 given"),
        (SETTINGS, EVALUATION, "the program is eval.py, on rank 0 train.py"),
        (EVALUATION, replace(EVALUATION, batch_size=8), "--batch_size is 8, on rank 0 64"),
    ],
)
def test_flags(settings, other, said):
    asked, told = ((s, None, "train" if isinstance(s, Settings) else "validation") for s in (settings, other))
    with pytest.raises(InputError, match=rf"^rank 1 differs: {said}.*: give all ranks the same flags, data and"):
        check_ranks(WithAnother(facts(*told)), *asked)


def test_another_machine_may_have_its_files_elsewhere():
    other = replace(SETTINGS, data_dir="/mnt/there", log_dir="/tmp/run")
    check_ranks(WithAnother(facts(other, None, "train")), SETTINGS, None, "train")


FEWER, OTHERS = "the number of train images is 9, on rank 0 12", "the digest of the names of the train images is "


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        *((kind, {}, None) for kind in WRITERS),
        *((kind, {"images": 9}, FEWER) for kind in WRITERS),
        *((kind, {"encoded": lambda i: b"x" * 600 * (i + 1)}, OTHERS) for kind in ("records", "tars")),
        ("folders", {"name": "n{1:05d}/picture {0}"}, OTHERS),
        ("folders", {"name": "m{1:05d}/image {0}"}, "class 0 is 'm00000', on rank 0 'n00000'"),
    ],
)
def test_data_of_another_directory(tmp_path, kind, changes, said):
    for name, how in (("here", {}), ("there", changes)):
        (tmp_path / name).mkdir()
        WRITERS[kind](tmp_path / name, "train", **{"images": 12} | how)
    here, there = (
        find_dataset(tmp_path / d, num_classes=None, label_base=None, split="train") for d in ("here", "there")
    )
    transport = WithAnother(facts(SETTINGS, there, "train"))
    with pytest.raises(InputError, match=f"^rank 1 differs: {said}") if said else nullcontext():
        check_ranks(transport, SETTINGS, here, "train")


def test_the_images_that_training_evaluates_on(tmp_path):
    for name, images in (("here", 12), ("there", 9)):
        WRITERS["records"](tmp_path / name, "validation", images)
    here, there = (
        find_dataset(tmp_path / d, num_classes=None, label_base=None, split="validation") for d in ("here", "there")
    )
    for other, said in ((there, "9"), (None, "none")):
        transport = WithAnother(facts(SETTINGS, None, "train", other))
        with pytest.raises(InputError, match=f"the number of validation images is {said}, on rank 0 12"):
            check_ranks(transport, SETTINGS, None, "train", here)


def test_the_programs_compare_before_they_write(tmp_path, monkeypatch):
    for program in (train, evaluate):
        monkeypatch.setattr(program, "connect", lambda *_: WithAnother({"torch": "0.1"}))
    with pytest.raises(InputError, match="rank 1 differs"):
        train.train(Settings(model="lenet", log_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    torch.save(state_of("lenet"), tmp_path / "run/checkpoint-00000009.pt")
    WRITERS["records"](tmp_path / "data", "validation", 6, label=lambda i: 3 + i)
    with pytest.raises(InputError, match="rank 1 differs"):
        evaluate.evaluate(Evaluation(data_dir=str(tmp_path / "data"), log_dir=str(tmp_path / "run")))


class OneOf(Transport):
    """Is one of some ranks of this process, which add up when the first of them waits for that."""

    def __init__(self, size, rank, sent):
        super().__init__(Launch(size, rank))
        self.sent = sent

    def all_reduce(self, tensor, name):
        self.sent.append(tensor)
        return self.add_up

    def add_up(self):
        if len(self.sent) == self.size:
            total = sum(self.sent)
            for tensor in self.sent:
                tensor.copy_(total)
            self.sent.clear()

    def gather(self, value):
        return [f"place {rank}" for rank in range(self.size)]


def flip(tensor, bit):
    """Flips one bit of the last value that is not padding."""
    word = tensor[tensor.nonzero()[-1]].view(torch.int16 if tensor.itemsize == 2 else torch.int32)
    tensor[tensor.nonzero()[-1]] = (word ^ 1 << bit).view(tensor.dtype)


@pytest.mark.parametrize("every", [1, 5, 20])
@pytest.mark.parametrize(("buffer", "bit"), [("weight", 0), ("weight", 30), ("momentum", 0), ("ema_weight", 4)])
def test_one_bit_of_one_rank(device, buffer, bit, every):
    sent = []
    arenas = [make(device, momentum_dtype=torch.bfloat16, ema=0.9).arena for _ in range(3)]
    for arena in arenas:
        arena.momentum.copy_(arena.weight)
    checks = [WeightCheck(arena, OneOf(3, rank, sent), every) for rank, arena in enumerate(arenas)]
    steps = every + min(LAG, every - 1)  # the first sum is sent behind the last of them, and judged at the next step
    for step in range(1, steps + 2):
        if step == every:
            assert not any(check.reason for check in checks)
            flip(getattr(arenas[1], buffer), bit)
        said = [check.reason for check in checks]
        for check in checks:
            check.follow(step)
    assert not any(said)
    found = f"at step {every}: rank 1 (place 1) differs from the other 2 in weights or momentum"
    assert [check.reason for check in checks] == [found] * 3


def test_equal_ranks_are_not_told_apart(device):
    sent = []
    checks = [WeightCheck(make(device).arena, OneOf(2, rank, sent), 1) for rank in range(2)]
    for step in range(1, 4):
        for check in checks:
            check.follow(step)
    assert not any(check.reason for check in checks)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("ab", "ranks 0 (p0) and 1 (p1) differ"),
        ("aabaa", "rank 2 (p2) differs from the other 4"),
        ("aabb", "ranks 0 (p0), 1 (p1), 2 (p2) and 1 more differ"),
        ("abacaaa", "ranks 1 (p1) and 3 (p3) differ from the other 5"),
    ],
)
def test_who_differs(rows, said):
    found = who_differs([(ord(row),) for row in rows], [f"p{rank}" for rank in range(len(rows))])
    assert found == f"{said} in weights or momentum"


class WithFaultyMemory(Transport):
    """Is rank 0 of two. The other has the same weights before a step of the run."""

    def __init__(self, step):
        super().__init__(Launch(2))
        self.step, self.run = step, None

    @property
    def faulty(self):
        return self.run is not None and self.run.step >= self.step

    def all_reduce(self, tensor, name):
        if name == "weight_check":
            tensor[1] = tensor[0] + self.faulty
        return lambda: None

    def gather(self, value):
        sums = isinstance(value, tuple) and all(type(part) is int for part in value)
        return [value, (value[0] + 1, *value[1:]) if sums and self.faulty else value]


@pytest.mark.parametrize(
    ("flags", "stops_at", "found_at", "kept"),
    [
        ({"check_ranks": 4, "save_interval": 999}, 8 + 3 + 1, 8, []),
        ({"save_interval": 0}, 8, 8, [7, 6, 5]),
        ({"check_ranks": 0, "save_interval": 0}, None, None, [14, 13, 12]),
    ],
)
def test_weights_that_ranks_disagree_on_are_not_saved(tmp_path, monkeypatch, capsys, flags, stops_at, found_at, kept):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = {"conv": "torch", "batch_size": 2, "num_batches": 14, "num_classes": 9}
    settings = Settings(model="trivial", log_dir=str(tmp_path), **options, **flags)
    transport = WithFaultyMemory(8)
    run = transport.run = train.Run(settings, None, transport, None)
    assert run.loop() == (1 if stops_at else 0)
    assert [checkpoint.step_of(path) for path in checkpoint.in_directory(tmp_path)] == kept
    told = [(event["step"], event["reason"]) for event in plot.read(tmp_path) if event["event"] == "diverged"]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Diverged at step")]
    assert len(told) == len(said) == (stops_at is not None)
    for (step, reason), line in zip(told, said, strict=True):
        assert step == stops_at
        assert reason.startswith(f"at step {found_at}: ranks 0 (cpu of ")
        assert "a GPU or memory is faulty" in line
        assert line.endswith(f"the last good checkpoint is {tmp_path}/checkpoint-00000007.pt" if kept else "checkpoint")
