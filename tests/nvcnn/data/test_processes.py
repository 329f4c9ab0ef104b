"""Worker processes: what they must not wait for, what is said when one is killed."""

import os
import subprocess
import sys

import pytest
import torch

from nvcnn.data import find_dataset, folder, imagenet, verify
from nvcnn.data.processes import worker_pool
from nvcnn.program import InputError

# OpenMP's threads run in the parent, and then the workers need the table of so many samples that OpenMP divides it.
SEARCH = """
import sys
import torch
from nvcnn.check_data import search
from nvcnn.data import find_dataset

torch.set_num_threads(2)
a = torch.ones(3_000_000)
(a + a).sum()
dataset = find_dataset(sys.argv[1], num_classes=10, label_base=None, split="train", lenient=True)
print(len(search(dataset, "train", range(600), False, 2, quiet=True)))
"""


def test_a_search_after_threads_ran_in_the_parent(write, tmp_path):
    write(tmp_path, "train", images=20_000, shards=1, encoded=lambda i: b"", label=lambda i: 1)
    ended = subprocess.run([sys.executable, "-c", SEARCH, tmp_path], capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("0\n", "")


def test_the_table_of_samples_is_there_before_the_workers(write, tmp_path):
    write(tmp_path, "train")
    dataset = find_dataset(tmp_path, num_classes=61, label_base=None, split="train", lenient=True)
    assert "table" in vars(dataset.source("train"))


def test_a_worker_has_one_thread():
    with worker_pool(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1


def die(*_, **__):
    os._exit(9)


def test_a_killed_worker_is_one_line(folders, raw, copy, monkeypatch):
    for module, function, run in (
        (folder, "scan_class", lambda: folder.scan_folders(folders[0], "--train", 2)),
        (imagenet, "scan_class", lambda: imagenet.scan_train(raw.train, 2)),
        (verify, "check_shard", lambda: verify.verify(copy, 2)),
    ):
        monkeypatch.setattr(module, function, die)
        with pytest.raises(InputError, match="a worker process was killed, perhaps for want of memory: give"):
            run()
