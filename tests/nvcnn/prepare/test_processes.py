"""A worker process that is killed ends in one line."""

import os

import pytest

from nvcnn.prepare import folder, imagenet, verify, write
from nvcnn.program import InputError
from tests.nvcnn.prepare import preparing


def die(*_, **__):
    os._exit(9)


def write_half(shard, **_):
    (shard.path.parent / ".train-00000-of-00001.0.tmp").touch()
    die()


def test_a_killed_worker_is_one_line(folders, raw, prepared, tmp_path, monkeypatch):
    for module, function, run in (
        (folder, "scan_class", lambda: folder.scan_folders(folders[0], "--train", 2)),
        (imagenet, "scan_class", lambda: imagenet.scan_train(raw.train, 2)),
        (verify, "check_shard", lambda: verify.verify(prepared, 2)),
        (write, "write_shard", lambda: preparing.run(folders, tmp_path / "out")),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, function, write_half if module is write else die)
            with pytest.raises(InputError, match="a worker process was killed, perhaps for lack of memory: give"):
                run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".unfinished"]
