"""How ranks talk: the only file that imports Horovod, mpi4py or torch.distributed.

`connect` returns a `Transport`. The base class is that of a single rank, which needs none of the three.
"""

import os
import re
import socket
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvcnn.program import InputError, Launch, here, launched
from nvcnn.watch_ranks import Watch, addresses, end_with_launcher, watch_ranks

FOR_EVER = timedelta(days=365)
WITHOUT_MPI = ("torchrun", "srun", "the environment")  # an MPI that did not start its process may end it


def waited_for(collective: Callable) -> Callable:
    """Has a method that waits for the other ranks say so."""

    @wraps(collective)
    def waits(*arguments: Any) -> Any:
        here.collectives += 1
        here.waits = True  # and stays so where it fails: another rank may be to blame
        result = collective(*arguments)
        here.waits = False
        return result

    return waits


def begun(wait: Callable[[], Any]) -> Callable[[], None]:
    """Counts a collective that has begun; returns what waits for it, and says so."""
    here.collectives += 1

    def waits() -> None:
        here.waits = True
        wait()
        here.waits = False

    return waits


class Transport:
    """A single rank."""

    name = "none"
    why = ""  # this one was chosen
    bfloat16 = True  # sums bfloat16
    watch: Watch | None = None  # over the ranks

    def __init__(self, launch: Launch):
        self.size, self.rank, self.local_rank = launch.size, launch.rank, launch.local_rank

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name

    def broadcast(self, tensor: Tensor) -> None:
        """Copies rank 0's values into `tensor` of every rank, in place."""

    def all_reduce(self, tensor: Tensor, name: str) -> Callable[[], None]:
        """Starts the sum over ranks, in place, unscaled. Returns what waits for it. `name`: the same on all ranks."""
        return lambda: None

    def gather(self, value: Any) -> list[Any]:
        """Returns the `value` of every rank, in order of rank; to be used on rank 0 only."""
        return [value]

    def barrier(self) -> None:
        """Returns when all ranks have come here."""
        self.gather(None)

    def close(self) -> None:
        """Call after the last collective."""
        if self.watch:
            self.watch.close()


class Horovod(Transport):
    name = "horovod"
    bfloat16 = False  # Horovod 0.28.1 refuses it

    def __init__(self, launch: Launch):
        super().__init__(launch)
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")  # the arena's buckets are the fusion
        if torch.cuda.is_available():
            os.environ.setdefault("HOROVOD_ENABLE_ASYNC_COMPLETION", "1")  # `synchronize` orders the stream, no spin
        try:
            import horovod.torch as hvd

            hvd.init()
        except ImportError as error:
            raise InputError(
                f"{launch.size} ranks need Horovod ({error}): run `make horovod`, or give --transport=torch"
            ) from None
        self.hvd = hvd
        agree(launch, hvd.size(), f"Horovod's MPI, {mpi_library()}")
        self.rank, self.local_rank = hvd.rank(), hvd.local_rank()
        if torch.cuda.is_available() and not hvd.nccl_built():
            raise InputError(
                "this Horovod was built without NCCL, so it cannot sum on GPUs: "
                "run `python -m nvcnn.install_horovod --force`, or give --transport=torch"
            )

    @waited_for
    def broadcast(self, tensor: Tensor) -> None:
        self.hvd.broadcast_(tensor.view(torch.uint8), root_rank=0)  # it refuses bfloat16, and bits are bits

    def all_reduce(self, tensor: Tensor, name: str) -> Callable[[], None]:
        handle = self.hvd.allreduce_async_(tensor, op=self.hvd.Sum, name=name)
        return begun(lambda: self.hvd.synchronize(handle))

    @waited_for
    def gather(self, value: Any) -> list[Any]:
        return self.hvd.allgather_object(value, name="gather")  # its default name is the type, which may differ


class Torch(Transport):
    """torch.distributed: gloo for what is on the host, NCCL for what is on a GPU. From torchrun, mpiexec or srun."""

    name = "torch"

    def __init__(self, launch: Launch):
        super().__init__(launch)
        import torch.distributed as dist
        import torch.distributed.nn  # imported later, its default arguments would keep the group for ever

        self.dist = dist
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        address, port = self.meet(launch) or named_place(launch)
        if address not in ("127.0.0.1", "localhost") and os.environ.get("LOCAL_WORLD_SIZE") != str(self.size):
            face_others()
        try:
            socket.getaddrinfo(address, port)  # whoever does not know the name would try for half an hour
            if launch.launcher in ("torchrun", "the environment"):
                dist.init_process_group(backend)  # torchrun has a store of its own at that place
            else:
                method = f"tcp://{address}:{port}"
                dist.init_process_group(backend, init_method=method, rank=self.rank, world_size=self.size)
        except (dist.DistError, socket.gaierror) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(
                f"the ranks do not meet at {address}:{port} ({reason}): set MASTER_ADDR and "
                "MASTER_PORT to an address of rank 0's machine that the others reach, and a free port"
            ) from None

    def meet(self, launch: Launch) -> tuple[str, int] | None:
        """Returns rank 0's address and a free port of it, which MPI tells to all; None without an MPI."""
        world = mpi_world(launch)
        if world is None:
            return None
        self.rank = world.Get_rank()
        machine = world.Split_type(mpi().COMM_TYPE_SHARED)
        self.local_rank = machine.Get_rank()
        place = None
        if self.rank == 0:
            with socket.socket() as s:
                s.bind(("", 0))
                alone = machine.Get_size() == self.size
                host = "127.0.0.1" if alone else face_others() or socket.gethostname()
                place = host, s.getsockname()[1]
        return world.bcast(place)

    @waited_for
    def broadcast(self, tensor: Tensor) -> None:
        self.dist.broadcast(tensor, src=0)

    def all_reduce(self, tensor: Tensor, name: str) -> Callable[[], None]:
        work = self.dist.all_reduce(tensor, op=self.dist.ReduceOp.SUM, async_op=True)
        return begun(work.wait)

    @waited_for
    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.size
        self.dist.all_gather_object(values, value)
        return values

    def wait_for_ever(self) -> None:
        """Leaves it to the watch when to give up: a rank that is waited for may go on with what takes long."""
        self.dist.distributed_c10d._set_pg_timeout(FOR_EVER)

    def close(self) -> None:
        """Ends Gloo's threads, too: one that drops a tensor while the interpreter ends would abort the process."""
        super().close()
        self.dist.destroy_process_group()


def connect(transport: str, rank_timeout: float = 0) -> Transport:
    """Returns the transport of this process: none for one rank, else "horovod" or "torch", or either ("auto").

    rank_timeout: seconds after which a rank that does not move ends the job; 0: never.
    Raises InputError if it is missing, or if another MPI's launcher started us: then each process would be alone.
    """
    launch = launched()
    if launch.size == 1:
        return Transport(launch)
    if launch.launcher != "the environment":  # a shell may end before what it has started
        end_with_launcher(launch.rank)
    name, why = choose(transport, launch)
    connected = Horovod(launch) if name == "horovod" else Torch(launch)
    connected.why = why
    connected.watch = watch_ranks(connected, rank_timeout)
    if isinstance(connected, Torch) and (connected.watch or not rank_timeout):
        connected.wait_for_ever()
    return connected


def choose(asked: str, launch: Launch) -> tuple[str, str]:
    """Returns "horovod" or "torch", and why "auto" is that one: the first where it can be.

    Raises InputError if ranks were given different ones: each kind would wait for ever for the other.
    """
    world, obstacle = mpi_world(launch), ""
    if asked == "auto":
        if launch.launcher in WITHOUT_MPI:
            obstacle = f"{launch.launcher} started the ranks, not MPI"
        elif world is None and mpi():
            obstacle = f"{mpi_library()} did not start the ranks"
        else:
            obstacle = no_horovod(torch.cuda.is_available())
    answers = world.allgather((asked, obstacle)) if world else [(asked, obstacle)]
    if len(found := {one for one, _ in answers}) > 1:  # without a world Horovod finds no other rank, and says so
        raise InputError(f"the ranks have different --transport ({', '.join(sorted(found))}): give all the same flags")
    if asked != "auto":
        return asked, ""
    obstacle = next((theirs for _, theirs in answers if theirs), "")
    return ("torch", obstacle) if obstacle else ("horovod", "its MPI started the ranks")


def no_horovod(gpu: bool) -> str:
    """Returns why Horovod cannot sum here; "" if it can."""
    try:
        import horovod.torch as hvd
    except (ImportError, OSError) as error:
        return f"no Horovod: {str(error).partition(chr(10))[0]}"
    return "this Horovod was built without NCCL" if gpu and not hvd.nccl_built() else ""


def agree(launch: Launch, size: int, library: str) -> None:
    """Raises InputError unless `library` sees as many ranks as the launcher started."""
    if size != launch.size:
        raise InputError(
            f"{launch.launcher} started {launch.size} ranks ({launch.variable}), but {library}, sees {size}: "
            "start with the mpiexec of that library" + ", or give --transport=torch" * (launch.launcher in WITHOUT_MPI)
        )


def mpi() -> Any:
    """Returns mpi4py's MPI; None where it is not installed, or finds no library of MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    return MPI


def mpi_world(launch: Launch) -> Any:
    """Returns MPI's communicator of all ranks; None unless an mpiexec of mpi4py's library started them."""
    if launch.launcher in WITHOUT_MPI or (MPI := mpi()) is None or MPI.COMM_WORLD.Get_size() != launch.size:
        return None
    return MPI.COMM_WORLD


def mpi_library() -> str:
    MPI = mpi()
    return MPI.Get_library_version().split(",")[0].strip() if MPI else "of unknown version (no mpi4py)"


def named_place(launch: Launch, environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Returns rank 0's address and port: MASTER_ADDR and MASTER_PORT, or what follows from Slurm's variables.

    Raises InputError if nothing names them.
    """
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    step = tuple(environment.get(f"SLURM_{name}") for name in ("STEP_NUM_TASKS", "PROCID"))
    # srun with the interface of MPICH (--mpi=pmi2) sets the variables of that, too.
    if launch.launcher in ("srun", "MPICH or Intel MPI") and step == (str(launch.size), str(launch.rank)):
        alone = environment.get("SLURM_STEP_NUM_NODES") == "1"
        address = address or ("127.0.0.1" if alone else first_host(environment.get("SLURM_STEP_NODELIST", "")))
        port = port or slurm_port(environment)
    if address and port.isascii() and port.isdecimal() and int(port) < 2**16:
        return address, int(port)
    if launch.launcher in WITHOUT_MPI:
        raise InputError("--transport=torch needs MASTER_ADDR and MASTER_PORT, rank 0's: start with torchrun")
    if MPI := mpi():
        agree(launch, MPI.COMM_WORLD.Get_size(), f"mpi4py's MPI, {mpi_library()}")
    raise InputError(
        f"{launch.size} ranks started by {launch.launcher} need mpi4py to meet: `pip install mpi4py`, start with "
        "torchrun, or set MASTER_ADDR and MASTER_PORT for all of them"
    )


def face_others(environment: MutableMapping[str, str] = os.environ) -> str:
    """Has Gloo talk by the network, and returns this machine's address there; "" where its name does.

    Gloo takes the address of the machine's own name, for which Debian's /etc/hosts has 127.0.1.1. Then it is that of
    the default route's interface, or of the only one. Raises InputError if there are several and no such route.
    """
    host, interface, known = socket.gethostname(), environment.get("GLOO_SOCKET_IFNAME", ""), addresses()
    if not interface:
        own: set[Any] = set()
        with suppress(OSError):
            own = {place[0] for *_, place in socket.getaddrinfo(host, None)}
        others = [name for name, address in known.items() if not address.startswith("127.")]
        if not others or any(address != "::1" and not address.startswith("127.") for address in own):
            return ""
        routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()]
        ways = [name for name, to, *_ in routes if to == "00000000" and name in others] or others
        if len(set(ways)) > 1:
            raise InputError(
                f"{host} has no address of its own that other machines reach ({', '.join(own) or 'an unknown name'}): "
                f"set GLOO_SOCKET_IFNAME to the network interface that they do, one of {', '.join(ways)}"
            )
        environment["GLOO_SOCKET_IFNAME"] = interface = ways[0]
    return known.get(interface.partition(",")[0], "")


def first_host(nodes: str) -> str:
    """Returns the first machine of a list as Slurm writes it: node07 of node[07-09,12],login1."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0] if first else "")


def slurm_port(environment: Mapping[str, str]) -> str:
    """Returns a port that all ranks of a job's step know, and its neighbours on the machine do not take; "" without."""
    job, step = (environment.get(f"SLURM_{name}_ID", "") for name in ("JOB", "STEP"))
    known = all(number.isascii() and number.isdecimal() for number in (job, step))
    return str(10_000 + (int(job) + 1000 * int(step)) % 20_000) if known else ""


class Vote:
    """What any rank asked for at one step, known to all ranks at the next, without waiting for a device.

    Clocks and signals differ by a step between ranks; acting on the answer, all of them act at the same step.
    """

    def __init__(self, transport: Transport, questions: int, name: str = "vote"):
        self.transport, self.name = transport, name  # of the votes under way at a time each has its own
        self.asked = torch.zeros(questions, dtype=torch.int32)
        self.wait: Callable[[], None] = lambda: None

    def __call__(self, *asks: bool) -> list[bool]:
        """Asks now; returns which of the questions any rank asked the last time."""
        self.wait()
        answer = [bool(n) for n in self.asked]
        self.asked = torch.tensor(asks, dtype=torch.int32)
        self.wait = self.transport.all_reduce(self.asked, self.name)
        return answer
