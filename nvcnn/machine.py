"""The part of the machine that this rank has: its device, its cores, and the versions of what runs on it."""

import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import nvcnn
from kernels.implementation import runs_triton
from nvcnn.distributed import Transport
from nvcnn.program import InputError

MOST_INPUT_THREADS = 16  # each has decoder buffers of its own


def compute_dtype(fp16: bool, bf16: bool) -> torch.dtype:
    """Returns what the flags of that name ask for."""
    return torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32


def use_device(transport: Transport) -> tuple[torch.device, int]:
    """Returns this rank's device, made current, and the threads its input may use; sets PyTorch's own threads.

    Raises InputError when two ranks would share a GPU.
    """
    place = platform.node(), sorted(os.sched_getaffinity(0))
    # Ranks that the launcher left on the same cores share them.
    threads = max(1, len(place[1]) // transport.gather(place).count(place))
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    if len(place[1]) == 1 < (os.cpu_count() or 1) and transport.size > 1 and transport.rank == 0:
        print(f"each rank is bound to 1 of {os.cpu_count()} cores: give mpiexec --bind-to none", file=sys.stderr)
    if transport.local_rank == 0 and (reason := unused_gpu()):
        print(reason, file=sys.stderr)
    if not torch.cuda.is_available():
        return torch.device("cpu"), threads
    # A launcher that shows each rank a GPU of its own shows it as number 0.
    device = torch.device("cuda", transport.local_rank % torch.cuda.device_count())
    gpu = place[0], str(torch.cuda.get_device_properties(device).uuid)
    if (ranks := transport.gather(gpu).count(gpu)) > 1:
        raise InputError(f"{ranks} ranks share a GPU of {place[0]}: start one rank for each of its GPUs")
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = torch.backends.cudnn.deterministic = True  # the fastest of the deterministic
    return device, min(threads, MOST_INPUT_THREADS)


def slowness(dtype: torch.dtype) -> float:
    """Returns how many times as long as in fp32 a convolution takes on this CPU, forward and backward, measured now.

    On one thread, by its own time: what else the machine does does not count.
    """

    def seconds(dtype: torch.dtype) -> float:
        options: dict[str, Any] = {"dtype": dtype, "device": "cpu", "requires_grad": True}
        x, weight = (torch.full(shape, 0.5, **options) for shape in ((2, 32, 14, 14), (32, 32, 3, 3)))
        times = []
        for _ in range(3):
            start = time.thread_time()
            torch.nn.functional.conv2d(x, weight, padding=1).sum().backward()
            times.append(time.thread_time() - start)
        return min(times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return seconds(dtype) / seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def unused_gpu() -> str:
    """Returns a line that says why a GPU of this machine is not used; "" where one is, is hidden, or none is there."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not has_gpu():
        return ""
    if torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a CPU build: install its CUDA build, https://pytorch.org/get-started"
    else:
        reason = f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}"
        try:
            torch.cuda.init()
        except RuntimeError as error:  # it names the driver, say
            reason = f"{' '.join(str(error).split())} ({reason})"
    return f"there is an NVIDIA GPU, but this runs on the CPU: {reason}"


def has_gpu() -> bool:
    """Returns whether the machine shows an NVIDIA GPU, whatever torch can do with it."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    if (tool := shutil.which("nvidia-smi")) is None:
        return False
    try:
        return subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20).stdout.startswith("GPU ")
    except (OSError, subprocess.TimeoutExpired):
        return False


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Returns the state of the random generators of host and device."""
    state = {"torch_rng": torch.get_rng_state()}
    return state | ({"cuda_rng": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Sets the random generators to what `random_state` returned, maybe on another device."""
    torch.set_rng_state(state["torch_rng"])
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"], device)


def chosen_kernels() -> str:
    """Returns which implementation computes here, "triton" or "reference". Raises InputError if that cannot run."""
    try:
        return "triton" if runs_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu")) else "reference"
    except ValueError as error:
        raise InputError(str(error)) from None


def versions() -> dict[str, str]:
    """Returns the versions of what computes and communicates, by name."""
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
