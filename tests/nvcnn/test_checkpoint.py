"""A checkpoint is written whole or not at all, and read whole or refused."""

import os

import pytest
import torch

from nvcnn import checkpoint
from nvcnn.program import InputError


def write(directory, step, keep=3):
    checkpoint.save(checkpoint.path_of(directory, step), {"weights": {"w": torch.full((1000,), float(step))}}, keep)


def test_round_trip_and_keep(tmp_path):
    for step in (1, 20, 300, 99_999_999):
        write(tmp_path, step)
    assert [p.name for p in checkpoint.in_directory(tmp_path)] == [
        "checkpoint-99999999.pt",
        "checkpoint-00000300.pt",
        "checkpoint-00000020.pt",
    ]
    path, state = checkpoint.newest(tmp_path)
    assert path.name == "checkpoint-99999999.pt"
    assert (state["weights"]["w"] == 99_999_999).all()
    assert len(list(tmp_path.iterdir())) == 3  # no temporary file stays


def test_a_damaged_newer_one_pushes_none_out(tmp_path):
    for step in (10, 20):
        write(tmp_path, step, keep=9)
    checkpoint.path_of(tmp_path, 60).write_text("damaged")
    write(tmp_path, 30, keep=2)
    assert [p.name[-5:] for p in checkpoint.in_directory(tmp_path)] == ["60.pt", "30.pt", "20.pt"]


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "foreign", "pipe", "text"])
def test_a_bad_one_is_passed_over_with_a_word(tmp_path, damage):
    write(tmp_path, 1)
    write(tmp_path, 2)
    path = checkpoint.path_of(tmp_path, 2)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "flipped":
        data[data.index(torch.full((1,), 2.0).numpy().tobytes() * 10)] ^= 1
        path.write_bytes(data)
    elif damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif damage == "foreign":
        torch.save({"state_dict": {}}, path)
    else:
        path.write_text("hello")
    with pytest.raises(InputError, match=path.name) as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)
    said = []
    found, state = checkpoint.newest(tmp_path, warn=said.append)
    assert found == checkpoint.path_of(tmp_path, 1)
    assert (state["weights"]["w"] == 1).all()
    assert len(said) == 1
    assert path.name in said[0]


def test_only_bad_ones_is_an_error(tmp_path):
    checkpoint.path_of(tmp_path, 5).write_text("x")
    with pytest.raises(InputError, match="none of its 1 checkpoints"):
        checkpoint.newest(tmp_path, warn=lambda line: None)


def test_an_interrupted_write_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path, 1)
    before = checkpoint.path_of(tmp_path, 1).read_bytes()

    def full_disk(state, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 1)
    assert checkpoint.path_of(tmp_path, 1).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001.pt"]


def test_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 99)
    write(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(InputError, match="version 99"):
        checkpoint.load(checkpoint.path_of(tmp_path, 1))
