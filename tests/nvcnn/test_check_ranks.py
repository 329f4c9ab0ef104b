"""Ranks that were given something else are refused before anything is written, in a line that says who and what."""

import hashlib
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from nvcnn import evaluate, train
from nvcnn.check_ranks import check_ranks, facts
from nvcnn.data.dataset import find_dataset
from nvcnn.distributed import Transport
from nvcnn.program import InputError, Launch
from nvcnn.settings import Evaluation, Settings
from tests.nvcnn.checkpoints import state_of
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
        monkeypatch.setattr(program, "connect", lambda _: WithAnother({"torch": "0.1"}))
    with pytest.raises(InputError, match="rank 1 differs"):
        train.train(Settings(model="lenet", log_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    torch.save(state_of("lenet"), tmp_path / "run/checkpoint-00000009.pt")
    WRITERS["records"](tmp_path / "data", "validation", 6, label=lambda i: 3 + i)
    with pytest.raises(InputError, match="rank 1 differs"):
        evaluate.evaluate(Evaluation(data_dir=str(tmp_path / "data"), log_dir=str(tmp_path / "run")))
