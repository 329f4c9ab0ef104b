"""How a program starts and ends: what the launcher said, signals, exit codes, and a rank's failure, which ends the job.

Exit codes: 0 done; 2 bad usage or input, one line on stderr; 3 stopped by a signal with everything saved; 1 anything
else. Nothing here imports torch, so that bad usage is reported at once.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

BAD_INPUT = 2
SAVED_AND_STOPPED = 3


class InputError(Exception):
    """Bad usage or bad input. The message is one line that names the flag, file or value and says what to do."""


# By launcher: the variable that marks it, and those of size, rank, and rank on this machine; the most telling first.
LAUNCHERS = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", *(f"OMPI_COMM_WORLD_{what}" for what in ("SIZE", "RANK", "LOCAL_RANK"))),
    "MVAPICH": ("MV2_COMM_WORLD_SIZE", *(f"MV2_COMM_WORLD_{what}" for what in ("SIZE", "RANK", "LOCAL_RANK"))),
    "MPICH or Intel MPI": ("PMI_SIZE", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    "srun": ("SLURM_STEP_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "the environment": ("RANK", "WORLD_SIZE", "RANK", "LOCAL_RANK"),
}


@dataclass(frozen=True)
class Launch:
    """What the launcher of this process said: how many ranks there are, and which of them this is."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    launcher: str = "none"
    variable: str = ""


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """Returns what the environment variables of a known launcher say; a single rank without any."""
    for launcher, (mark, size, rank, local_rank) in LAUNCHERS.items():
        if mark in environment and size in environment:
            given = {name: int(environment[name]) for name in (size, rank, local_rank) if name in environment}
            return Launch(
                size=given[size],
                rank=given.get(rank, 0),
                local_rank=given.get(local_rank, 0),
                launcher=launcher,
                variable=f"{size}={given[size]}",
            )
    return Launch()


def run(program: Callable[[], int]) -> NoReturn:
    """Calls `program` and exits with what it returns, or with the code of what it raises."""
    name = Path(sys.argv[0]).name
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        # In another encoding a name would be another text, in files that are written and in the order of classes.
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
    if isinstance(sys.stdout, TextIOWrapper):  # it may be closed
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a name is no reason to fail
    try:
        code = program()
    except InputError as error:
        wait_for_rank_0()
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        abort(BAD_INPUT)
    except KeyboardInterrupt:  # outside of the training loop, which saves
        wait_for_rank_0()
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        abort(1)
    except Exception:
        rank = f"rank {launched().rank}: " if launched().size > 1 else ""
        print(f"{rank}{traceback.format_exc()}", end="", file=sys.stderr, flush=True)
        abort(1)
    sys.exit(code)


@contextmanager
def caught() -> Iterator[list[int]]:
    """Returns a list to which SIGTERM, SIGINT and SIGUSR1 are appended as they come, instead of ending the process.

    Another one a second later does end it. SIGUSR1 is among them because mpiexec hands it on as it is, while Open MPI 5
    kills its ranks half a second after SIGTERM.
    """
    signals: list[int] = []
    asked = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {s: signal.getsignal(s) for s in asked}
    first: list[float] = []

    def note(number: int, _: Any) -> None:
        if first and time.monotonic() - first[0] > 1:  # a launcher may pass on at once what the terminal sent to all
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        first.append(time.monotonic())
        signals.append(number)

    for s in asked:
        signal.signal(s, note)
    try:
        yield signals
    finally:
        for s in asked:
            signal.signal(s, before[s])


def abort(code: int) -> NoReturn:
    """Ends this process, and with it the whole job, at once: a rank that waited for the others would wait for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(0.3)  # the launcher passes on what was said here before it says its own
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.COMM_WORLD.Get_size() > 1:
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)  # the launcher ends the others


def wait_for_rank_0(seconds: float = 3.0) -> None:
    """Lets rank 0 report an error that all ranks have: it then ends the job before this returns."""
    if launched().rank != 0:
        time.sleep(seconds)
