"""The part of the machine that this rank has: its device, its cores, and the versions of what runs on it."""

import os
import platform
import sys
from importlib import metadata

import torch
import triton

import nvcnn
from nvcnn.distributed import Transport
from nvcnn.errors import InputError


def compute_dtype(fp16: bool, bf16: bool) -> torch.dtype:
    return torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32


def use_device(transport: Transport) -> tuple[torch.device, int]:
    """This rank's device, made current, and how many threads its input may use; sets PyTorch's own threads."""
    bound, cores = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    # Unbound, the ranks of a machine share its cores; bound, the launcher has already divided them.
    threads = max(1, bound // transport.local_size) if bound == cores else bound
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    if threads == 1 and cores > transport.local_size and transport.size > 1 and transport.rank == 0:
        print(f"each rank is bound to 1 of {cores} cores: give mpiexec --bind-to none", file=sys.stderr)
    if not torch.cuda.is_available():
        return torch.device("cpu"), threads
    if transport.local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {transport.local_rank} has no GPU of its own: this machine shows {torch.cuda.device_count()}; "
            "start at most that many ranks on it"
        )
    torch.cuda.set_device(transport.local_rank)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = True  # the fastest of the deterministic
    return torch.device("cuda", transport.local_rank), threads


def versions() -> dict[str, str]:
    found = {"nvcnn": nvcnn.__version__, "python": platform.python_version()}
    found |= {"torch": torch.__version__, "triton": triton.__version__}
    for package in ("nvidia-dali-cuda130", "nvidia-dali-cuda120", "horovod", "mpi4py"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return found
