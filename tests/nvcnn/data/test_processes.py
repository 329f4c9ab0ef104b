"""Worker processes: what they must not wait for."""

import subprocess
import sys

import torch

from nvcnn.data.dataset import find_dataset
from nvcnn.data.processes import worker_pool

# OpenMP's threads run in the parent, and then the workers need the table of so many samples that OpenMP divides it.
SEARCH = """
import sys
import torch
from nvcnn.check_data import search
from nvcnn.data.dataset import find_dataset

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
    assert "places" in vars(dataset.source("train"))


def test_a_worker_has_one_thread():
    with worker_pool(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1
