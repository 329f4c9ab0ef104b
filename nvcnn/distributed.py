"""How ranks talk: the only file that imports Horovod, mpi4py or torch.distributed.

`connect` returns a `Transport`. The base class is that of a single rank, which needs none of the three.
"""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nvcnn.program import InputError, Launch, launched


class Transport:
    """A single rank."""

    name = "none"
    bfloat16 = True  # sums bfloat16

    def __init__(self, launch: Launch):
        self.size, self.rank, self.local_rank = launch.size, launch.rank, launch.local_rank

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

    def broadcast(self, tensor: Tensor) -> None:
        self.hvd.broadcast_(tensor.view(torch.uint8), root_rank=0)  # it refuses bfloat16, and bits are bits

    def all_reduce(self, tensor: Tensor, name: str) -> Callable[[], None]:
        handle = self.hvd.allreduce_async_(tensor, op=self.hvd.Sum, name=name)
        return lambda: self.hvd.synchronize(handle)

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
        if launch.launcher in ("torchrun", "the environment"):
            given = os.environ.get("MASTER_PORT", "")
            if not (os.environ.get("MASTER_ADDR") and given.isascii() and given.isdecimal() and int(given) < 2**16):
                raise InputError("--transport=torch needs MASTER_ADDR and MASTER_PORT, rank 0's: start with torchrun")
            dist.init_process_group(backend)
        else:
            address, port = self.rendezvous(launch)
            method = f"tcp://{address}:{port}"
            dist.init_process_group(backend, init_method=method, rank=self.rank, world_size=self.size)

    def rendezvous(self, launch: Launch) -> tuple[str, int]:
        """Returns rank 0's address and a free port of it, which MPI tells to all."""
        try:
            from mpi4py import MPI
        except ImportError as error:
            raise InputError(
                f"--transport=torch under {launch.launcher} needs mpi4py ({error}): "
                "`pip install mpi4py`, or start with torchrun"
            ) from None
        agree(launch, MPI.COMM_WORLD.Get_size(), f"mpi4py's MPI, {mpi_library()}")
        self.rank = MPI.COMM_WORLD.Get_rank()
        machine = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank = machine.Get_rank()
        place = None
        if self.rank == 0:
            with socket.socket() as s:
                s.bind(("", 0))
                host = "127.0.0.1" if machine.Get_size() == self.size else socket.gethostname()
                place = host, s.getsockname()[1]
        return MPI.COMM_WORLD.bcast(place)

    def broadcast(self, tensor: Tensor) -> None:
        self.dist.broadcast(tensor, src=0)

    def all_reduce(self, tensor: Tensor, name: str) -> Callable[[], None]:
        work = self.dist.all_reduce(tensor, op=self.dist.ReduceOp.SUM, async_op=True)
        return lambda: work.wait() and None

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.size
        self.dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Ends Gloo's threads, too: one that drops a tensor while the interpreter ends would abort the process."""
        self.dist.destroy_process_group()


def connect(transport: str) -> Transport:
    """Returns the transport of this process: none for one rank, else "horovod" or "torch".

    Raises InputError if it is missing, or if another MPI's launcher started us: then each process would be alone.
    """
    launch = launched()
    if launch.size == 1:
        return Transport(launch)
    same_transport(launch, transport)
    return Horovod(launch) if transport == "horovod" else Torch(launch)


def same_transport(launch: Launch, transport: str) -> None:
    """Raises InputError if ranks were given different transports: each kind would wait for ever for the other."""
    if launch.launcher in ("torchrun", "the environment"):  # there Horovod finds no other rank, and says so
        return
    try:
        from mpi4py import MPI
    except ImportError:
        return
    if len(found := set(MPI.COMM_WORLD.allgather(transport))) > 1:
        raise InputError(f"the ranks have different --transport ({', '.join(sorted(found))}): give all the same flags")


def agree(launch: Launch, size: int, library: str) -> None:
    """Raises InputError unless `library` sees as many ranks as the launcher started."""
    if size != launch.size:
        raise InputError(
            f"{launch.launcher} started {launch.size} ranks ({launch.variable}), but {library}, sees {size}: "
            "start with the mpiexec of that library" + ", or give --transport=torch" * (launch.launcher == "torchrun")
        )


def mpi_library() -> str:
    try:
        from mpi4py import MPI
    except ImportError:
        return "of unknown version (no mpi4py)"
    return MPI.Get_library_version().split(",")[0].strip()


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
