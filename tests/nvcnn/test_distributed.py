"""Wrong launchers are refused, ranks vote, and a single rank needs nobody. Several ranks are in tests/end_to_end."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from nvcnn.distributed import Transport, Vote, agree, connect
from nvcnn.program import InputError, Launch


def test_an_mpiexec_of_another_library_is_refused():
    with pytest.raises(InputError, match=r"MPICH .* 2 ranks \(PMI_SIZE=2\), but Open MPI v5, sees 1"):
        agree(Launch(2, 1, 0, "MPICH or Intel MPI", "PMI_SIZE=2"), 1, "Open MPI v5")


def test_ranks_with_different_transports_are_refused(monkeypatch):
    world = SimpleNamespace(allgather=lambda mine: [mine, "torch"])
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=world)))
    monkeypatch.setattr("nvcnn.distributed.launched", lambda: Launch(2, 0, 0, "Open MPI", "OMPI_COMM_WORLD_SIZE=2"))
    with pytest.raises(InputError, match=r"different --transport \(horovod, torch\)"):
        connect("horovod")


class Late(Transport):
    """Brings another rank's asks when it is waited for, and not before."""

    def all_reduce(self, tensor, name):
        return lambda: tensor.add_(1)


def test_a_vote_waits_for_the_other_ranks():
    vote = Vote(Late(Launch()), questions=1)
    vote(False)
    assert vote(False) == [True]


def test_a_vote_is_known_one_step_later():
    vote = Vote(Transport(Launch()), questions=2)
    assert vote(False, True) == [False, False]
    assert vote(True, False) == [False, True]
    assert vote(False, False) == [True, False]


def test_a_single_rank_needs_no_partner():
    one = Transport(Launch())
    x = torch.arange(3.0)
    one.broadcast(x)
    one.all_reduce(x, "x")()
    one.barrier()
    assert x.tolist() == [0, 1, 2]
    assert one.gather("me") == ["me"]


CLOSES = """
from pathlib import Path

import torch
from nvcnn.distributed import Torch
from nvcnn.program import Launch

transport = Torch(Launch(1, 0, 0, "torchrun", "WORLD_SIZE=1"))
import torch._dynamo  # as training has it: imports functions whose default argument is the group of that moment

transport.all_reduce(torch.ones(4), "ones")()
names = lambda: [n for task in Path("/proc/self/task").iterdir() if "gloo" in (n := (task / "comm").read_text())]
before = len(names())
transport.close()
print(before > 0, names())
"""


def test_closing_ends_the_threads_of_gloo():
    with socket.socket() as s:
        s.bind(("", 0))
        port = s.getsockname()[1]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "1", "RANK": "0"}
    program = subprocess.run(
        [sys.executable, "-c", CLOSES], env=os.environ | rendezvous, capture_output=True, text=True
    )
    assert program.stdout == "True []\n", program.stderr
