"""Two runs of the harness, and what it draws and compares."""

import copy
import shutil

import pytest
import torch

from benchmarks import faults


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"IMAGES": 64, "VALIDATION": 20, "EPOCHS": 1}.items():
            patch.setattr(faults, name, value)
        yield faults.Harness(tmp_path_factory.mktemp("faults"))


KILLED = next(kind for kind in faults.KINDS if kind.title == "SIGKILL of all")


@pytest.mark.parametrize(("program", "place", "at"), [("prepare", "shard", 5), ("save", "save", 3)])
def test_killed_and_again(harness, program, place, at):
    row = harness.disturb(faults.Fault(1, KILLED, program, "torch", "torch", 1, place, at, 0, "stop", 0))
    assert row["happened"]
    assert row["code"] not in (0, None)
    assert (row["verdict"], row["wrong"]) == ("survived", {})
    if program == "save":  # it was killed as it wrote the third checkpoint
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
    row = harness.disturb(faults.Fault(1, KILLED, program, "torch", "torch", 2, "step", 3, 0, "stop", 0))
    assert row["verdict"] == verdict
    assert row["wrong"].keys() == {verdict} - {"survived"}


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
