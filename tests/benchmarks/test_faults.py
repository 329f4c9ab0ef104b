"""Two runs of the harness, and what it draws and compares."""

import copy
import os
import shutil
import signal
import subprocess

import pytest
import torch

from benchmarks import faults
from nvcnn.program import InputError


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"IMAGES": 24, "VALIDATION": 20, "EPOCHS": 1}.items():
            patch.setattr(faults, name, value)
        yield faults.Harness(tmp_path_factory.mktemp("faults"))


BY_TITLE = {kind.title: kind for kind in faults.KINDS}
KILLED = BY_TITLE["SIGKILL of all"]


@pytest.mark.parametrize(("program", "place", "at"), [("prepare", "shard", 5), ("save", "save", 2)])
def test_killed_and_again(harness, program, place, at):
    row = harness.disturb(faults.Fault(1, KILLED, program, "torch", "torch", 1, place, at, 0, "stop", 0))
    assert row["happened"]
    assert row["code"] not in (0, None)
    assert (row["verdict"], row["wrong"]) == ("survived", {})
    if program == "save":  # it was killed as it wrote the second checkpoint
        assert row["from"] == row["saved"] > 0


def ended(**how):
    return faults.Ended(**{"code": 0, "text": '{"top1": 50.0}', "seconds": 1.0, "happened": True, "orphans": 0} | how)


KILL, END = ended(code=1, text=""), ended()


@pytest.mark.parametrize(
    ("verdict", "program", "first", "again", "file", "content"),
    [
        ("survived", "evaluate", KILL, END, "metrics.jsonl", ""),
        ("lost", "evaluate", KILL, ended(text='{"top1": 51.0}'), "metrics.jsonl", ""),
        ("lost", "evaluate", KILL, ended(code=2), "metrics.jsonl", ""),
        (
            "lost",
            "save",
            KILL,
            END,
            "metrics.jsonl",
            '{"event": "checkpoint", "step": 5, "path": "checkpoint-00000005.pt"}',
        ),
        ("hung", "evaluate", ended(code=None), END, "metrics.jsonl", ""),
        ("hung", "evaluate", KILL, ended(code=None), "metrics.jsonl", ""),
        ("traceback", "evaluate", ended(code=1, text="rank 0: Traceback"), END, "metrics.jsonl", ""),
        ("orphan", "evaluate", ended(code=1, text="", orphans=2), END, "metrics.jsonl", ""),
        ("half", "evaluate", KILL, END, ".part", "x"),
        ("missed", "evaluate", ended(happened=False), END, "metrics.jsonl", ""),
        ("lost", "evaluate", ended(happened=False, text='{"top1": 51.0}'), END, "metrics.jsonl", ""),
    ],
)
def test_what_did_not_survive_is_said(harness, tmp_path, monkeypatch, verdict, program, first, again, file, content):
    """Nothing is run: what two runs would have left is there."""
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / file).write_text(content)
    runs = iter((first, again))

    def run(words, output, *_):
        shutil.copytree(tmp_path / "left", output.parent / "run", dirs_exist_ok=True)
        return next(runs)

    monkeypatch.setattr(faults, "run", run)
    monkeypatch.setattr(harness, "work", tmp_path)
    expected = None if program == "save" else {"top1": 50.0}
    monkeypatch.setattr(harness, "undisturbed", lambda *_: (1.0, expected, tmp_path / "left"))
    row = harness.disturb(faults.Fault(1, KILLED, program, "torch", "torch", 2, "step", 1, 0, "stop", 0))
    assert row["verdict"] == verdict
    assert row["wrong"].keys() - {"missed"} == {verdict} - {"survived", "missed"}
    assert [line["survived"] for line in faults.summary([row])] == [int(verdict == "survived")] * 2


@pytest.mark.parametrize(
    ("title", "code", "step", "verdict"),
    [
        ("SIGTERM", 3, 2, "survived"),
        ("SIGTERM", 0, 6, "survived"),  # it was at its end
        ("SIGTERM", 0, 2, "lost"),
        ("SIGTERM", 143, 2, "lost"),
        ("the disk is full", 2, 2, "survived"),
        ("the disk is full", 0, 6, "lost"),
        ("the disk is full", 0, -1, "lost"),
        ("SIGKILL of all", 0, 6, "lost"),
        ("an exception on a rank", 2, 2, "lost"),
        ("SIGKILL of a data worker", 0, 2, "lost"),
        ("no memory on a rank", 0, 6, "survived"),
    ],
)
def test_an_exit_code_must_be_right(harness, tmp_path, monkeypatch, title, code, step, verdict):
    """Of a training that ends so, with a checkpoint of that step there, of 6; it has said nothing of one."""
    runs = iter((ended(code=code), ended(text=f"Restored checkpoint /run/checkpoint-{step}.pt")))
    steps = []

    def run(words, output, *_):
        (output.parent / "run").mkdir(exist_ok=True)
        steps.append(step if output.stem == "first" else 6)
        return next(runs)

    monkeypatch.setattr(faults, "run", run)
    monkeypatch.setattr(faults, "newest", lambda _: (steps[-1], {"step": steps[-1]}))
    monkeypatch.setattr(harness, "work", tmp_path)
    monkeypatch.setattr(harness, "undisturbed", lambda *_: (1.0, {"step": 6}, tmp_path))
    row = harness.disturb(faults.Fault(1, BY_TITLE[title], "train", "torch", "torch", 2, "step", 1, 0, "stop", 0))
    assert (row["verdict"], row["wrong"].keys()) == (verdict, {verdict} - {"survived"})


def test_a_step_that_was_saved_is_there_again_with_the_directory(harness, tmp_path, monkeypatch):
    def run(words, output, *_):
        (output.parent / "run").mkdir(exist_ok=True)
        (output.parent / "run/metrics.jsonl").write_text(
            '{"event": "checkpoint", "step": 5, "path": "checkpoint-00000005.pt"}'
        )
        return ended(code=2 if output.stem == "first" else 0)

    monkeypatch.setattr(faults, "run", run)
    monkeypatch.setattr(harness, "work", tmp_path)
    monkeypatch.setattr(harness, "undisturbed", lambda *_: (1.0, None, tmp_path))
    kind = BY_TITLE["the directory vanishes"]
    row = harness.disturb(faults.Fault(1, kind, "save", "torch", "torch", 2, "step", 1, 0, "stop", 0))
    assert row["wrong"] == {"lost": "step 5 was saved, -1 is what is there"}


def test_what_is_missed_is_tried_sooner(harness, tmp_path, monkeypatch):
    tried = []

    def run(words, output, *_):
        (output.parent / "run").mkdir(exist_ok=True)
        if output.stem == "first":
            tried.append(int(words[words.index("evaluate", words.index("SIGTERM")) + 1]))
        return ended(code=143 if tried[-1] == 1 and output.stem == "first" else 0, happened=tried[-1] == 1)

    monkeypatch.setattr(faults, "run", run)
    monkeypatch.setattr(harness, "work", tmp_path)
    (tmp_path / "trained").mkdir()
    monkeypatch.setattr(harness, "undisturbed", lambda *_: (1.0, {"top1": 50.0}, tmp_path / "trained"))
    row = harness.disturb(
        faults.Fault(1, BY_TITLE["SIGTERM"], "evaluate", "torch", "torch", 2, "evaluate", 4, 0, "stop", 0)
    )
    assert (tried, row["at"], row["verdict"]) == ([4, 2, 1], 1, "survived")


def test_the_rank_is_struck_and_not_its_worker(tmp_path):
    mark = tmp_path / "mark"
    environment = os.environ | {faults.MARK: str(mark), "OMPI_COMM_WORLD_RANK": "1"}
    run = subprocess.Popen(["sh", "-c", "sleep 60 & echo; wait"], env=environment, stdout=subprocess.PIPE)
    try:
        assert run.stdout.readline() == b"\n"
        fault = faults.Fault(1, BY_TITLE["SIGKILL of a rank"], "train", "torch", "torch", 2, "any", 1, 1, "stop", 0)
        faults.strike(fault, mark, run)
        assert run.wait(10) == -signal.SIGKILL
    finally:
        faults.kill_all(str(mark))
        run.communicate()


def test_rows_of_other_code_are_not_gone_on_from(tmp_path):
    row = {
        "seed": 1,
        "kind": KILLED.title,
        "happened": True,
        "code": 1,
        "seconds": 1.0,
        "verdict": "survived",
        "wrong": {},
    }
    faults.write(tmp_path, [row], "abc")
    assert "abc" in (tmp_path / "faults.md").read_text().splitlines()[0]
    assert faults.rows_before(tmp_path / "faults.json", 1, "abc") == [row]
    with pytest.raises(InputError, match="has runs of the code at abc, this is abd: remove it, or give another --out"):
        faults.rows_before(tmp_path / "faults.json", 1, "abd")
    assert faults.rows_before(tmp_path / "other.json", 1, "abd") == []


def test_a_run_is_drawn_by_its_number():
    drawn = [faults.draw(1, number) for number in range(1, 200)]
    assert drawn == [faults.draw(1, number) for number in range(1, 200)]
    assert {fault.kind for fault in drawn} == {kind for kind in faults.KINDS if not faults.missing(kind)}
    assert all(fault.program in fault.kind.programs and fault.rank < fault.ranks for fault in drawn)


def test_a_difference_is_named():
    one = {"weights": {"a": torch.zeros(3)}, "ranks": [{"batch": 1}], "settings": {"log_dir": "a"}}
    other = copy.deepcopy(one) | {"settings": {"log_dir": "b"}}
    assert not faults.difference(one, other)
    other["ranks"][0]["batch"] = 2
    assert faults.difference(one, other) == "checkpoint, ranks, 0, batch"
    other = copy.deepcopy(one)
    other["weights"]["a"][1] = 1e-30
    assert faults.difference(one, other) == "checkpoint, weights, a"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.zeros(2), -torch.zeros(2), False),
        (torch.tensor(float("nan")), torch.tensor(float("nan")), True),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(2), False),
        (torch.zeros(2, 3).t(), torch.zeros(3, 2), True),
        (torch.zeros(2, 3), torch.zeros(3, 2), False),
        (torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16), True),
        (0.0, -0.0, False),
        (float("nan"), float("nan"), True),
        (1, 1.0, False),
        ((1.0, "a"), (1.0, "a"), True),
    ],
)
def test_a_difference_is_one_of_bits(one, other, same):
    assert (faults.difference({"a": one}, {"a": other}) == "") is same
