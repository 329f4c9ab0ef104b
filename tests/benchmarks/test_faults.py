"""Two runs of the harness, and what it draws and compares."""

import copy

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
