"""Worker processes wait for nothing that does not come, and end with their program."""

import gc
import os
import resource
import signal
import subprocess
import sys
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from nvcnn.data.backend import open_training
from nvcnn.data.processes import worker_pool
from nvcnn.program import InputError
from tests.nvcnn.data.reading import find, training
from tests.samples import record, write_shard

REPOSITORY = Path(__file__).parents[3]

# OpenMP's threads run in the parent, and then the workers need the table of so many samples that OpenMP divides it.
SEARCH_AND_TRAIN = """
import faulthandler, multiprocessing, sys
import torch
from nvcnn.check_data import search
from nvcnn.data.backend import open_training
from nvcnn.data.dataset import find_dataset

faulthandler.dump_traceback_later(45, exit=True)
torch.set_num_threads(2)
a = torch.ones(3_000_000)
(a + a).sum()
dataset, small = (find_dataset(d, num_classes=61, label_base=1, split="train", lenient=True) for d in sys.argv[1:])
print(len(search(dataset, "train", range(600), False, 2, quiet=True)), flush=True)

multiprocessing.set_start_method("forkserver")  # the default of Python 3.14
data = open_training(small, "torch", batch_size=4, image_size=16, crop_area=(0.3, 1.0), crop_aspect=(0.8, 1.25),
                     seed=1, rank=0, ranks=1, device=torch.device("cpu"), threads=2)
print(len(next(data).labels), flush=True)
"""


def test_a_program_with_threads_searches_trains_and_ends(dataset, tmp_path):
    """It ends without closing its data, whose workers ignore the signal by which Python would end them at exit."""
    write_shard(tmp_path / "train-0", [record(b"", 1)] * 20_000)
    command = [sys.executable, "-c", SEARCH_AND_TRAIN, tmp_path, dataset.directory]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "0\n4\n", "")


def test_the_table_of_samples_is_there_before_the_workers(dataset):
    assert "places" in vars(find(dataset.directory, num_classes=61, lenient=True).source("train"))


class Pipeline:
    """Stands in for one of DALI's, which in a fork would wait for threads that are not there."""

    def __init__(self, ended):
        self.itself, self.ended = self, ended

    def __del__(self):
        self.ended.append(self)


@pytest.mark.parametrize("read", [True, False], ids=["readers", "pool"])
def test_what_a_program_has_left_is_collected_before_its_workers_begin(dataset, read):
    ended = []
    gc.disable()
    try:
        Pipeline(ended)
        if read:
            data = open_training(
                find(dataset.directory, num_classes=61, lenient=True), "torch", batch_size=2, image_size=16,
                crop_area=(0.3, 1.0), crop_aspect=(0.8, 1.25), seed=1, rank=0, ranks=1, device=torch.device("cpu"),
                threads=1,
            )  # fmt: skip
            next(data)
            data.close()
        else:
            with worker_pool(1):
                assert ended
    finally:
        gc.enable()
    assert ended


def test_a_worker_has_one_thread():
    with worker_pool(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 1


@pytest.fixture
def data(dataset):
    found = find(dataset.directory, num_classes=61, lenient=True)
    return training(found, "torch", batch_size=16, image_size=64, threads=2)


@pytest.mark.timeout(60)
def test_shared_memory_without_room_for_a_batch_is_an_error(data):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # of files in /dev/shm, too
    try:
        with pytest.raises(InputError, match=r"^/dev/shm: has no room \(File too large.* 2 workers, up to 1 MB .*shm"):
            next(data)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        data.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "for lack of memory"), (signal.SIGBUS, "since /dev/shm is full")]
)
def test_a_killed_worker_is_an_error_of_the_next_batch(data, number, reason):
    next(data)
    worker = active_children()[-1]
    os.kill(worker.pid, number)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(InputError, match=f"{number.name} ended a worker, most likely {reason}: give the command again"):
        list(data)
    data.close()


def test_a_worker_that_is_stuck_is_ended(data, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    next(data)
    worker = active_children()[-1]
    os.kill(worker.pid, signal.SIGSTOP)
    data.close()
    worker.join(10)
    ended = worker.exitcode
    worker.kill()  # were it there still, this process would wait for it at its end
    assert ended == -signal.SIGKILL


ABORT = """
import os, signal, sys
from multiprocessing import active_children
from pathlib import Path

from tests.nvcnn.data.reading import find, training

data = training(find(Path(sys.argv[1]), num_classes=61, lenient=True), "torch", threads=2)
next(data)
os.kill(active_children()[0].pid, signal.SIGSTOP)
os._exit(1)
"""


def test_a_worker_that_is_stuck_ends_with_its_rank(dataset):
    """What it holds is the end of the pipe that is read here."""
    subprocess.run([sys.executable, "-c", ABORT, dataset.directory], capture_output=True, timeout=60, cwd=REPOSITORY)
