"""Wrong launchers are refused, ranks vote, and a single rank needs nobody. Several ranks are in tests/end_to_end."""

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from nvcnn import distributed
from nvcnn.distributed import (
    Horovod,
    Torch,
    Transport,
    Vote,
    agree,
    choose,
    connect,
    face_others,
    first_host,
    named_place,
)
from nvcnn.program import InputError, Launch


def test_an_mpiexec_of_another_library_is_refused():
    with pytest.raises(InputError, match=r"MPICH .* 2 ranks \(PMI_SIZE=2\), but Open MPI v5, sees 1"):
        agree(Launch(2, 1, 0, "MPICH or Intel MPI", "PMI_SIZE=2"), 1, "Open MPI v5")


OPEN_MPI = Launch(2, 0, 0, "Open MPI", "OMPI_COMM_WORLD_SIZE=2")
PMI = Launch(2, 0, 0, "MPICH or Intel MPI", "PMI_SIZE=2")


@pytest.fixture
def parts(monkeypatch):
    """Returns a function that sets what is installed: mpi4py, which sees so many ranks, and Horovod, with NCCL."""

    def install(sees: int | None, horovod: bool, nccl: bool = False, other=lambda mine: mine) -> None:
        world = SimpleNamespace(Get_size=lambda: sees, allgather=lambda mine: [mine, other(mine)])
        MPI = SimpleNamespace(COMM_WORLD=world, Get_library_version=lambda: "Open MPI v5, of a package")
        monkeypatch.setitem(sys.modules, "mpi4py", None if sees is None else SimpleNamespace(MPI=MPI))
        hvd = SimpleNamespace(nccl_built=lambda: nccl)
        monkeypatch.setitem(sys.modules, "horovod", SimpleNamespace(torch=hvd) if horovod else None)
        monkeypatch.setitem(sys.modules, "horovod.torch", hvd if horovod else None)

    return install


def test_ranks_with_different_transports_are_refused(monkeypatch, parts):
    monkeypatch.setattr("nvcnn.distributed.launched", lambda: OPEN_MPI)
    parts(2, horovod=True, other=lambda mine: ("torch", ""))
    with pytest.raises(InputError, match=r"different --transport \(horovod, torch\)"):
        connect("horovod")


@pytest.mark.parametrize(
    ("launch", "gpu", "installed", "transport", "why"),
    [
        (OPEN_MPI, False, (2, True), "horovod", "its MPI"),
        (OPEN_MPI, False, (None, True), "horovod", "its MPI"),  # Horovod itself counts the ranks
        (OPEN_MPI, False, (2, False), "torch", "no Horovod: "),
        (OPEN_MPI, True, (2, True, False), "torch", "without NCCL"),
        (OPEN_MPI, True, (2, True, True), "horovod", "its MPI"),
        (PMI, False, (1, True), "torch", "Open MPI v5 did not start the ranks"),
        (OPEN_MPI, False, (2, True, False, lambda mine: ("auto", "no Horovod: there")), "torch", "no Horovod: there"),
        (Launch(2, 0, 0, "srun", ""), False, (2, True), "torch", "srun started"),
        (Launch(2, 0, 0, "torchrun", ""), False, (2, True), "torch", "torchrun started"),
    ],
)
def test_auto_is_horovod_where_it_can_be(monkeypatch, parts, launch, gpu, installed, transport, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    parts(*installed)
    chosen, reason = choose("auto", launch)
    assert chosen == transport
    assert why in reason
    for asked in ("horovod", "torch"):
        if len(installed) < 4:
            assert choose(asked, launch) == (asked, "")


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_an_mpi_that_started_nothing_is_not_woken(monkeypatch, launcher):
    """Under srun it may end the process."""
    woken = []
    monkeypatch.setattr("nvcnn.distributed.mpi", lambda: woken.append("mpi4py"))
    launch = Launch(2, 0, 0, launcher, "")
    assert choose("auto", launch)[0] == "torch"
    assert Torch.meet(SimpleNamespace(), launch) is None
    assert woken == []


def test_horovod_that_is_asked_for_and_missing(parts):
    parts(2, horovod=False)
    with pytest.raises(InputError, match=r"2 ranks need Horovod .* `make horovod`, or give --transport=torch"):
        Horovod(OPEN_MPI)


STEP = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "31415926", "SLURM_STEP_ID": "2"}
SRUN = Launch(2, 0, 0, "srun", "SLURM_STEP_NUM_TASKS=2")
ALONE, TWO = {"SLURM_STEP_NUM_NODES": "1"}, {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "gpu[07-08]"}


@pytest.mark.parametrize(
    ("launch", "environment", "place"),
    [
        (SRUN, STEP | ALONE, ("127.0.0.1", 27_926)),
        (SRUN, STEP | TWO, ("gpu07", 27_926)),
        (PMI, STEP | TWO, ("gpu07", 27_926)),  # srun --mpi=pmi2
        (SRUN, STEP | TWO | {"MASTER_ADDR": "10.0.0.7"}, ("10.0.0.7", 27_926)),
        (OPEN_MPI, {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}, ("a", 29_500)),
        (OPEN_MPI, STEP | TWO, "need mpi4py to meet: .* or set MASTER_ADDR and MASTER_PORT"),  # a step of mpiexec's own
        (PMI, STEP | TWO | {"SLURM_PROCID": "1"}, "need mpi4py to meet"),
        (SRUN, STEP, "needs MASTER_ADDR and MASTER_PORT"),
        (SRUN, STEP | TWO | {"MASTER_PORT": "65536"}, "needs MASTER_ADDR and MASTER_PORT"),
        (SRUN, {n: v for n, v in (STEP | TWO).items() if n != "SLURM_JOB_ID"}, "needs MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_ranks_meet_where_their_launcher_says(parts, launch, environment, place):
    parts(None, horovod=False)
    if isinstance(place, tuple):
        assert named_place(launch, environment) == place
    else:
        with pytest.raises(InputError, match=place):
            named_place(launch, environment)


LO, TWO_CARDS = {"lo": "127.0.0.1"}, {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.7"}


@pytest.mark.parametrize(
    ("own", "addresses", "route", "given", "taken"),
    [
        ("10.0.0.7", TWO_CARDS, "", "", ("", "")),  # the name does
        ("127.0.1.1", LO | {"eth0": "10.0.0.7"}, "", "", ("eth0", "10.0.0.7")),
        ("", LO | {"eth0": "10.0.0.7"}, "", "", ("eth0", "10.0.0.7")),  # nobody knows the name
        ("127.0.1.1", TWO_CARDS, "eth0", "", ("eth0", "10.0.0.7")),
        ("127.0.1.1", TWO_CARDS, "", "", "GLOO_SOCKET_IFNAME .* one of docker0, eth0"),
        ("127.0.1.1", TWO_CARDS, "eth0", "docker0", ("docker0", "172.17.0.1")),
        ("127.0.1.1", LO, "", "", ("", "")),
    ],
)
def test_ranks_talk_by_an_interface_that_others_reach(monkeypatch, tmp_path, own, addresses, route, given, taken):
    """Debian gives a machine's own name the address 127.0.1.1."""

    def resolved(host, port):
        if not own:
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (own, 0))]

    (tmp_path / "route").write_text(f"Iface Destination Gateway\n{route or 'eth0'} {'0' * 7}{not route:d} 010200C0\n")
    monkeypatch.setattr(distributed, "Path", lambda _: tmp_path / "route")
    monkeypatch.setattr(distributed, "addresses", lambda: addresses)
    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    environment = {"GLOO_SOCKET_IFNAME": given} if given else {}
    if isinstance(taken, str):
        with pytest.raises(InputError, match=taken):
            face_others(environment)
    else:
        address = face_others(environment)
        assert (environment.get("GLOO_SOCKET_IFNAME", ""), address) == taken


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a-1,b", "a-1"), ("n[001-128,200],m", "n001"), ("r[2,4]n[05-06]-ib", "r2n05-ib"), ("", "")],
)
def test_the_first_of_slurms_machines(nodes, first):
    assert first_host(nodes) == first


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
