"""A checkpoint is written whole or not at all, and read whole or refused."""

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nvcnn import checkpoint, weights
from nvcnn.machine import chosen_kernels
from nvcnn.program import InputError
from nvcnn.settings import Settings, as_json


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


def test_they_are_ordered_by_number(tmp_path):
    for step in (99_999_998, 99_999_999, 100_000_000):
        write(tmp_path, step, keep=2)
    assert [checkpoint.step_of(path) for path in checkpoint.in_directory(tmp_path)] == [100_000_000, 99_999_999]


def test_files_of_the_user_are_left_alone(tmp_path):
    """They neither count as the newest nor are they removed: their names are not those that the program writes."""
    write(tmp_path, 10)
    names = ["00000010-best", "12-before", "12", "000000012", "00000012 (1)", "٠٠٠٠٠٠١٢", "best", ""]
    for name in names:
        (tmp_path / f"checkpoint-{name}.pt").write_bytes(checkpoint.path_of(tmp_path, 10).read_bytes())
    assert checkpoint.newest(tmp_path)[0] == checkpoint.path_of(tmp_path, 10)
    write(tmp_path, 11, keep=1)
    assert checkpoint.in_directory(tmp_path) == [checkpoint.path_of(tmp_path, 11)]
    assert all((tmp_path / f"checkpoint-{name}.pt").exists() for name in names)


def test_a_damaged_newer_one_pushes_none_out(tmp_path):
    for step in (10, 20):
        write(tmp_path, step, keep=9)
    checkpoint.path_of(tmp_path, 60).write_text("damaged")
    write(tmp_path, 30, keep=2)
    assert [p.name[-5:] for p in checkpoint.in_directory(tmp_path)] == ["60.pt", "30.pt", "20.pt"]


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None


def test_every_bit_counts(tmp_path):
    """Zip's checksums leave out where a tensor is: with other bits there one is loaded for another."""
    write(tmp_path, 1)
    path = checkpoint.path_of(tmp_path, 1)
    whole = path.read_bytes()
    assert torch.load(path, weights_only=True)["weights"]["w"].sum() == 1000
    for damaged in (*range(0, len(whole), 41), *range(len(whole) - 450, len(whole), 3)):
        data = bytearray(whole)
        data[damaged] ^= 1 << damaged % 8
        for content in (data, whole[:damaged]):
            path.write_bytes(content)
            with pytest.raises(InputError, match=path.name):
                checkpoint.load(path)


def test_one_without_a_digest_is_read_and_held_to_its_checksums(tmp_path):
    path = checkpoint.path_of(tmp_path, 1)
    torch.save({"format": checkpoint.FORMAT, "version": 1, "weights": torch.full((9,), 3.0)}, path)
    assert checkpoint.load(path)["weights"].sum() == 27
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((9,), 3.0).numpy().tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="damaged at "):
        checkpoint.load(path)


DAMAGE = ["truncated", "empty", "flipped", "zeroed"]


@pytest.mark.parametrize("damage", [*DAMAGE, "foreign", "pipe", "unreadable", "text", "unlucky", "memory"])
def test_a_bad_one_is_passed_over_with_a_word(tmp_path, monkeypatch, damage):
    """Not all of them are damaged: what a disk fails to read today it may read tomorrow."""
    write(tmp_path, 1)
    write(tmp_path, 2)
    path = checkpoint.path_of(tmp_path, 2)
    data = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "zeroed":
        path.write_bytes(bytes(len(data)))
    elif damage in ("unlucky", "memory"):
        raised = OSError(errno.EIO, "Input/output error") if damage == "unlucky" else RuntimeError("can't allocate")

        def load(there, **options):
            if there == path:
                raise raised
            return whole(there, **options)

        name = "verified" if damage == "unlucky" else "torch.load"
        whole = checkpoint.verified if damage == "unlucky" else torch.load
        monkeypatch.setattr(f"nvcnn.checkpoint.{name}", load)
    elif damage == "flipped":
        data[data.index(torch.full((1,), 2.0).numpy().tobytes() * 10)] ^= 1
        path.write_bytes(data)
    elif damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif damage == "unreadable":
        path.unlink()
        path.symlink_to(path.name)
    elif damage == "foreign":
        torch.save({"state_dict": {}}, path)
    else:
        path.write_text("hello")
    with pytest.raises(InputError, match=path.name) as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)
    said, damaged = [], []
    found, state = checkpoint.newest(tmp_path, said.append, damaged)
    assert damaged == [path] * (damage in DAMAGE)
    assert found == checkpoint.path_of(tmp_path, 1)
    assert (state["weights"]["w"] == 1).all()
    assert len(said) == 1
    assert path.name in said[0]


def test_one_that_a_training_removes_meanwhile_gives_way_to_its_newer_one(tmp_path, monkeypatch):
    write(tmp_path, 1)
    read = checkpoint.read

    def slow(path):
        if path == checkpoint.path_of(tmp_path, 1):
            write(tmp_path, 2, keep=1)
        return read(path)

    monkeypatch.setattr(checkpoint, "read", slow)
    said = []
    assert checkpoint.newest(tmp_path, warn=said.append)[0] == checkpoint.path_of(tmp_path, 2)
    assert said == []


def test_only_bad_ones_is_an_error(tmp_path):
    checkpoint.path_of(tmp_path, 5).write_text("x")
    checkpoint.path_of(tmp_path, 6).symlink_to("absent")
    with pytest.raises(InputError, match="none of its 2 checkpoints"):
        checkpoint.newest(tmp_path, warn=lambda line: None)


def test_an_interrupted_write_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path, 1)
    before = checkpoint.path_of(tmp_path, 1).read_bytes()

    def full_disk(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(InputError, match="No space"):
        write(tmp_path, 1)
    assert checkpoint.path_of(tmp_path, 1).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001.pt"]


def test_a_failed_save_names_the_last_good_one(tmp_path):
    """Files may not become larger than this; torch.save then raises an error of its own after the system's."""
    write(tmp_path, 1)
    write(tmp_path, 2)
    checkpoint.path_of(tmp_path, 2).write_text("damaged")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, 30_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(InputError) as error:
                checkpoint.save(checkpoint.path_of(tmp_path, 3), {"weights": torch.zeros(20_000)}, keep=1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        new, last = checkpoint.path_of(tmp_path, 3), checkpoint.path_of(tmp_path, 1)
        assert str(error.value) == f"{new}: cannot be written (File too large); the last good checkpoint is {last}"
    assert len(list(tmp_path.iterdir())) == 2
    absent = checkpoint.path_of(tmp_path / "absent", 1)
    with pytest.raises(InputError, match=f"{absent}: .*No such file or directory.*; there is no good checkpoint"):
        write(absent.parent, 1)


@pytest.mark.parametrize(
    ("owner", "name", "nth", "number"),
    [
        (Path, "open", 1, errno.EROFS),
        (torch, "save", 1, errno.EDQUOT),
        (os, "fsync", 1, errno.ENOSPC),
        (os, "replace", 1, errno.EIO),
        (os, "fsync", 2, errno.EIO),  # of the directory: the new one is there, but a power cut may lose it
    ],
)
def test_wherever_saving_fails_those_before_stay(tmp_path, monkeypatch, owner, name, nth, number):
    """And the next one is written, also over what a killed run left."""
    write(tmp_path, 1)
    (tmp_path / ".part").write_bytes(bytes(10**5))
    whole, calls = getattr(owner, name), []

    def failing(*given, **options):
        calls.append(given)
        if len(calls) == nth:
            raise OSError(number, os.strerror(number))
        return whole(*given, **options)

    monkeypatch.setattr(owner, name, failing)
    new, last = checkpoint.path_of(tmp_path, 2), checkpoint.path_of(tmp_path, nth)
    with pytest.raises(InputError) as error:
        write(tmp_path, 2, keep=1)
    assert str(error.value) == f"{new}: cannot be written ({os.strerror(number)}); the last good checkpoint is {last}"
    assert checkpoint.load(checkpoint.path_of(tmp_path, 1))
    write(tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-00000003.pt"]


def test_a_file_system_that_cannot_sync_directories(tmp_path, monkeypatch):
    whole = os.fsync

    def fsync(file):
        if os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        whole(file)

    monkeypatch.setattr(os, "fsync", fsync)
    write(tmp_path, 1)
    assert checkpoint.newest(tmp_path)


def test_one_that_cannot_be_removed_is_said(tmp_path, capsys):
    checkpoint.path_of(tmp_path, 1).mkdir()  # what root cannot unlink either
    write(tmp_path, 2, keep=1)
    assert capsys.readouterr().err == f"{checkpoint.path_of(tmp_path, 1)}: cannot be removed (Is a directory)\n"


def settings_of(log_dir, **options):
    return Settings(model="lenet", log_dir=str(log_dir), **options)


def test_the_best_one_is_this_runs(tmp_path):
    """It stays where it is, and one of another run, or of the user, is not written over."""
    settings, best = settings_of(tmp_path), tmp_path / checkpoint.BEST
    assert checkpoint.best_so_far(settings_of(""), 1, None) == checkpoint.best_so_far(settings, 1, None) == -math.inf
    state = {"settings": as_json(settings), "ranks": [{}], "kernels": chosen_kernels(), "evaluation": {"top1": 61.5}}
    checkpoint.save(best, state, None)
    write(tmp_path, 2, keep=1)
    assert checkpoint.best_so_far(settings, 1, state) == 61.5
    assert checkpoint.best_so_far(settings, 1, None) == -math.inf  # of a run that begins anew
    assert checkpoint.newest(tmp_path)[0] == checkpoint.path_of(tmp_path, 2)
    with pytest.raises(InputError, match=r"checkpoint-best.pt is of another run \(--seed: there 1, here 2"):
        checkpoint.best_so_far(settings_of(tmp_path, seed=2), 1, state)
    del state["evaluation"]
    checkpoint.save(best, state, None)
    with pytest.raises(InputError, match="was not written there by a run"):
        checkpoint.best_so_far(settings, 1, state)
    best.write_bytes(best.read_bytes()[:-1])
    assert checkpoint.best_so_far(settings, 1, state) == -math.inf
    assert (best.exists(), (tmp_path / "checkpoint-best.pt.damaged").exists()) == (False, True)


def flip(path, where=1000):
    data = bytearray(path.read_bytes())
    data[where] ^= 4
    path.write_bytes(data)


def test_damaged_ones_are_set_aside_once_a_good_one_is_found(tmp_path, monkeypatch, capsys):
    settings = settings_of(tmp_path)
    state = {"settings": as_json(settings), "ranks": [{}], "kernels": chosen_kernels()}
    one, two, three = (checkpoint.path_of(tmp_path, step) for step in (1, 2, 3))
    for path in (one, two, three):
        checkpoint.save(path, state | {"weights": torch.zeros(1000)}, None)
    flip(two)
    flip(three)
    damaged = two.read_bytes()
    with pytest.raises(InputError, match="of another run"):
        checkpoint.resume(settings_of(tmp_path, seed=2), ranks=1)
    with pytest.raises(InputError, match=r"--checkpoint=.*damaged, its digest differs; give another file"):
        weights.read("checkpoint", str(two), None, None)
    assert checkpoint.newest(tmp_path)[0] == one  # as eval.py finds it
    assert {path.name for path in tmp_path.iterdir()} == {one.name, two.name, three.name, ".lock"}
    capsys.readouterr()
    (tmp_path / f"{two.name}.damaged").write_text("an earlier one")
    with monkeypatch.context() as without:
        without.setattr("os.rename", lambda *_: os.unlink(tmp_path))
        assert checkpoint.resume(settings, ranks=1)
        assert f"{two}: cannot be set aside as {two.name}.damaged-2 (Is a directory)" in capsys.readouterr().err
    assert checkpoint.resume(settings, ranks=1)
    assert capsys.readouterr().out.splitlines() == [
        f"{three}: damaged, its digest differs; give another file; trying the one before",
        f"{two}: damaged, its digest differs; give another file; trying the one before",
        f"{three} is set aside as {three.name}.damaged",
        f"{two} is set aside as {two.name}.damaged-2",
        f"Restored checkpoint {one}",
    ]
    assert checkpoint.resume(settings, ranks=1)
    assert capsys.readouterr().out == f"Restored checkpoint {one}\n"
    write(tmp_path, 4, keep=1)
    assert (tmp_path / f"{two.name}.damaged-2").read_bytes() == damaged
    four = checkpoint.path_of(tmp_path, 4)
    flip(four)
    before = sorted(tmp_path.iterdir())
    for _ in range(2):  # it does not begin anew when it is started again, either
        with pytest.raises(InputError, match="none of its 1 checkpoints can be read; give another --log_dir"):
            checkpoint.resume(settings, ranks=1)
    assert sorted(tmp_path.iterdir()) == before


def test_a_log_directory_that_is_gone_or_another(tmp_path):
    """It is not made again, and nothing is written to another one; an empty one is taken."""
    log_dir, away, other = (tmp_path / name for name in ("run", "away", "other"))
    for directory in (log_dir, other):
        checkpoint.begin(settings_of(directory), ranks=1)
        write(directory, 1)
    log_dir.rename(away)
    with pytest.raises(InputError, match=r"\(No such file or directory\); there is no good checkpoint"):
        write(log_dir, 2)
    assert not log_dir.exists()
    other.rename(log_dir)
    with pytest.raises(InputError, match=rf"{log_dir}: is not the directory in which this run began; bring that back"):
        write(log_dir, 2, keep=1)
    assert [checkpoint.step_of(path) for path in checkpoint.in_directory(log_dir)] == [1]
    (log_dir / ".lock").unlink()
    write(log_dir, 2)
    write(log_dir, 3, keep=1)
    log_dir.rename(other)
    away.rename(log_dir)
    write(log_dir, 4, keep=1)
    assert [checkpoint.step_of(path) for path in checkpoint.in_directory(log_dir)] == [4]


def test_a_directory_without_a_checkpoint_protects_nothing(tmp_path):
    """A run that failed before its first, for lack of memory, say, is tried again with other flags."""
    first, again = settings_of(tmp_path, batch_size=256), settings_of(tmp_path, batch_size=8)
    checkpoint.begin(first, ranks=1)
    assert checkpoint.resume(again, ranks=2) is None
    checkpoint.begin(again, ranks=2)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["settings"]["batch_size"], config["ranks"]) == (8, 2)
    state = {"settings": as_json(again), "ranks": [{}, {}], "kernels": chosen_kernels()}
    checkpoint.save(checkpoint.path_of(tmp_path, 1), state, keep=1)
    with pytest.raises(InputError, match=r"checkpoint-00000001.pt is of another run \(--batch_size: there 8, here 256"):
        checkpoint.resume(first, ranks=2)
    for damaged in ('{"settings": 5, "ranks": 1}', "{"):
        (tmp_path / "config.json").write_text(damaged)
        assert checkpoint.resume(again, ranks=2)["ranks"] == [{}, {}]


HOLDS = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_sums_by_another_transport_are_said(tmp_path, capsys, ranks):
    before, now = (settings_of(tmp_path, transport=transport) for transport in ("horovod", "torch"))
    state = {"settings": as_json(before), "ranks": [{}] * ranks, "kernels": chosen_kernels()}
    checkpoint.save(checkpoint.path_of(tmp_path, 1), state, 1)
    assert checkpoint.resume(now, ranks)
    said = "  horovod summed over the ranks until there, torch does now: sums may round otherwise"
    assert (said in capsys.readouterr().out) == (ranks > 1)


def test_a_second_training_is_refused_until_the_first_process_has_ended(tmp_path):
    settings, log_dir = settings_of(tmp_path / "run"), tmp_path / "run"
    assert checkpoint.resume(settings, ranks=1) is None
    assert not log_dir.exists()
    log_dir.mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLDS, log_dir / ".lock"], stdin=-1, stdout=-1) as first:
        assert first.stdout.read(4) == b"held"
        for enters in (checkpoint.resume, checkpoint.begin):
            with pytest.raises(InputError, match=f"--log_dir={log_dir}: another training is at work there"):
                enters(settings, 1)
        assert [path.name for path in log_dir.iterdir()] == [".lock"]
        first.kill()
    assert checkpoint.resume(settings, ranks=1) is None
    checkpoint.begin(settings, ranks=1)
    worker = os.fork()  # it does not keep the lock when this process has let go of it
    if worker == 0:
        signal.pause()
    try:
        checkpoint.locks.pop().close()
        holds = subprocess.run([sys.executable, "-c", HOLDS, log_dir / ".lock"], input="", timeout=60, stdout=-1)
        assert holds.returncode == 0
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_a_directory_that_cannot_be_locked(tmp_path, monkeypatch, capsys):
    def lockf(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "lockf", lockf)
    checkpoint.lock(tmp_path)
    assert "cannot be locked (No locks available)" in capsys.readouterr().err
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()
    with pytest.raises(InputError, match=r"\.lock: cannot be written to \(Is a directory\); give another --log_dir"):
        checkpoint.begin(settings_of(tmp_path), ranks=1)


def test_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "VERSION", 99)
    write(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(InputError, match="version 99"):
        checkpoint.load(checkpoint.path_of(tmp_path, 1))
