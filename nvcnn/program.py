"""How a program starts and ends: what the launcher said, signals, exit codes, and a rank's failure, which ends the job.

Exit codes: 0 done; 2 bad usage or input, one line on stderr; 3 stopped by a signal with everything saved; 1 anything
else. Nothing here imports torch, so that bad usage is reported at once.
"""

import faulthandler
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedWriter, FileIO, TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn, TextIO

BAD_INPUT = 2
SAVED_AND_STOPPED = 3
STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}
NEEDED = ("numpy", "torch", "triton")  # packages without which nothing works
AGAIN = 1.0  # seconds; a signal that comes sooner after another is the same, passed on by a launcher
PATIENCE = 30.0  # seconds of waiting for input after a signal; schedulers often kill after as long
BLAME = 5.0  # seconds in which the watch over the ranks says which one is to blame
ABORT = 10.0  # seconds after which a process ends that ends the job
PARENT = os.getppid()  # the launcher, if any
NOWHERE = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)  # now, as a process may end for lack of descriptors


class InputError(Exception):
    """Bad usage or bad input. The message is one line that names the flag, file or value and says what to do."""

    def __str__(self) -> str:
        return super().__str__().translate({10: "\\n", 13: "\\r"})  # a file's name may have several


class Lasting(FileIO):
    """A standard stream that outlives its reader (`| head`) and a full disk: what cannot be written is dropped."""

    lost = ""  # why, unless the reader has gone

    def __init__(self, stream: TextIO):
        super().__init__(stream.fileno(), "w", closefd=False)
        self.stream = stream  # unless somebody holds it, it is closed

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)
        except OSError as error:
            self.lost = error.strerror or str(error)
            return len(data)


CONTROLS = {n: f"\\x{n:02x}" for n in (*range(32), *range(127, 160)) if chr(n) not in "\t\n\r"}


class Plain(TextIOWrapper):
    """Text in which a name cannot command the terminal: control characters are written as \\x1b is here."""

    def write(self, text: str) -> int:
        return super().write(text.translate(CONTROLS))


def lasting(stream: Any) -> Any:
    """Returns a `Plain` text stream like this one, that is `Lasting`; for None, a closed one, what takes anything."""
    stream = stream or open(os.devnull, "w")  # noqa: SIM115 (it stays open)
    lines = stream.line_buffering or stream.write_through
    return Plain(BufferedWriter(Lasting(stream)), stream.encoding, stream.errors, line_buffering=lines)


# By launcher: the variable that marks it, and those of size, rank, and rank on this machine; the most telling first.
LAUNCHERS = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", *(f"OMPI_COMM_WORLD_{what}" for what in ("SIZE", "RANK", "LOCAL_RANK"))),
    "MVAPICH": ("MV2_COMM_WORLD_SIZE", *(f"MV2_COMM_WORLD_{what}" for what in ("SIZE", "RANK", "LOCAL_RANK"))),
    "MPICH or Intel MPI": ("PMI_SIZE", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    # SLURM_NTASKS may be the job's: an interactive step, of one task, has that of its allocation.
    "srun": ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "the environment": ("RANK", "WORLD_SIZE", "RANK", "LOCAL_RANK"),
}


@dataclass
class Here:
    """What this process is at, for a thread to tell others. Whoever changes it stores a value, and no more."""

    doing: str = "starts"
    step: int = 0  # the latest that is done
    collectives: int = 0  # begun with the other ranks: the one that has fewer than others is waited for
    waits: bool = False  # for other ranks, in one of them
    moves: int = 0  # what else shows that it goes on
    checkpoint: str = ""  # the last good one


here = Here()
leaving: list[Callable[[int], None]] = []  # called with the exit code when this process ends, and has said why


@contextmanager
def doing(what: str) -> Iterator[None]:
    """What happens inside is `what`, also when it fails."""
    before, here.doing = here.doing, what
    yield
    here.doing = before


@dataclass(frozen=True)
class Launch:
    """What the launcher of this process said: how many ranks there are, and which of them this is."""

    size: int = 1
    rank: int = 0
    local_rank: int = 0
    launcher: str = "none"
    variable: str = ""


def launched(environment: Mapping[str, str] = os.environ) -> Launch:
    """Returns what the environment variables of a known launcher say; a single rank without any.

    Raises InputError for values that no launcher sets.
    """
    for launcher, (mark, size, rank, local_rank) in LAUNCHERS.items():
        if mark in environment and size in environment:
            given = {name: environment.get(name, "") for name in (size, rank)}
            given[local_rank] = environment.get(local_rank, "0")
            for name, text in given.items():
                if not (text.isascii() and text.isdecimal()):
                    raise InputError(f"{name}={text}: must be a number, as {launcher} sets it: correct or unset it")
            n = {name: int(text) for name, text in given.items()}
            if n[rank] >= n[size]:
                raise InputError(f"{rank}={n[rank]}: must be below {size}={n[size]}: correct or unset it")
            return Launch(n[size], n[rank], n[local_rank], launcher, f"{size}={n[size]}")
    return Launch()


def launched_if_known() -> Launch:
    """Returns what `launched` does, and a single rank where that is an error."""
    try:
        return launched()
    except InputError:
        return Launch()


def run(program: Callable[[], int]) -> NoReturn:
    """Calls `program` and exits with what it returns, or with the code of what it raises."""
    name = Path(sys.argv[0]).name
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        # In another encoding a name would be another text, in files that are written and in the order of classes.
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
    sys.stdout = out = lasting(sys.stdout)
    sys.stderr = lasting(sys.stderr)
    out.reconfigure(errors="backslashreplace")  # as stderr: a name is no reason to fail
    try:
        code = program()
        out.flush()
        if code == 0 and out.buffer.raw.lost:
            print(f"{name}: done, but not all of its output could be written ({out.buffer.raw.lost})", file=sys.stderr)
            code = 1
    except (InputError, PermissionError) as error:
        wait_for_rank_0()
        told = f"{error.filename}: {error.strerror}" if isinstance(error, PermissionError) and error.filename else error
        # Rank 0 would have said what all have: this rank has it alone, or what is on its machine.
        mine = f"rank {launch.rank} on {socket.gethostname()}: " if (launch := launched_if_known()).rank else ""
        print(f"{name}: {mine}{told}", file=sys.stderr, flush=True)
        abort(BAD_INPUT)
    except KeyboardInterrupt:  # outside of the training loop, which saves
        wait_for_rank_0()
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        abort(1)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name in NEEDED:
            wait_for_rank_0()
            how = "activate its environment, or `pip install -e .` in the checkout"
            print(f"{name}: {sys.executable} has no {error.name}: {how}", file=sys.stderr, flush=True)
            abort(1)
        launch = launched_if_known()
        rank = f"rank {launch.rank}: " if launch.size > 1 else ""
        if here.waits and leaving:
            time.sleep(BLAME)  # another rank is to blame: then the watch ends this one, with a word about that
        if out_of_memory(error):
            where = f" on {socket.gethostname()}" if rank else ""
            error.add_note(f"Out of memory{where}: free some, or give a lower --batch_size")
        print(f"{rank}{traceback.format_exc()}", end="", file=sys.stderr, flush=True)
        abort(1)
    sys.exit(code)


def out_of_memory(error: Exception) -> bool:
    """Returns whether memory was missing, as Python, torch, DALI, CUDA or the system say it."""
    words = ("out of memory", "can't allocate", "cannot allocate")
    return isinstance(error, MemoryError) or any(some in str(error).lower() for some in words)


class Signals(list[int]):
    """Those that asked to stop, as they come."""

    waiting_since: float | None = None

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens inside waits for input. When a signal comes and the input does not, the process ends unsaved."""
        self.waiting_since = time.monotonic()
        with doing("waits for input"):
            yield
        self.waiting_since = None


@contextmanager
def caught() -> Iterator[Signals]:
    """Yields a list to which SIGTERM, SIGINT and SIGUSR1 are appended as they come, instead of ending the process.

    Another one a second later does end it. SIGUSR1 is among them because mpiexec hands it on as it is, while Open MPI 5
    kills its ranks half a second after SIGTERM.
    """
    signals = Signals()
    before = {s: signal.getsignal(s) for s in STOPS}
    first: list[float] = []

    def note(number: int, _: Any) -> None:
        if first and time.monotonic() - first[0] > AGAIN:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        first.append(time.monotonic())
        signals.append(number)

    for s in STOPS:
        signal.signal(s, note)
    try:
        with watched(lambda: signals.waiting_since):
            yield signals
    finally:
        for s in STOPS:
            signal.signal(s, before[s])


@contextmanager
def watched(waiting_since: Callable[[], float | None]) -> Iterator[None]:
    """Has a thread end the process that was signalled to stop, and then waits for input too long, or gets a second one.

    While the main thread waits in a library, DALI say, Python calls no handler, however many signals come.
    waiting_since: returns the time since when it waits for input; None: it does not.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=watch, args=(reader, waiting_since), daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)


def watch(reader: int, waiting_since: Callable[[], float | None]) -> None:
    """Does what `watched` says. reader: has a byte for each signal, its number, and a zero in the end."""
    name, first = Path(sys.argv[0]).name, math.inf
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    while True:
        came = os.read(reader, 4096) if poll.poll(None if first == math.inf else 1000 * min(1, PATIENCE)) else b""
        now, since, reason = time.monotonic(), waiting_since(), ""
        if 0 in came:
            return
        if not STOPS.isdisjoint(came):
            if now - first > AGAIN:
                time.sleep(1)  # the handler does it, unless the main thread is in a library
                reason = "a second signal"
            first = min(first, now)
        elif since is not None and now - max(since, first) > PATIENCE:
            reason = "a signal while it waited for input"
        if reason:
            wait_for_rank_0()
            print(f"{name}: ended by {reason}, without saving", file=sys.stderr, flush=True)
            abort(1)


def abort(code: int) -> NoReturn:
    """Ends this process, and with it the whole job, at once: a rank that waited for the others would wait for ever."""
    faulthandler.dump_traceback_later(ABORT, exit=True, file=NOWHERE)  # where an MPI hangs
    for leave in leaving:
        leave(code)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(0.3)  # the launcher passes on what was said here before it says its own
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.COMM_WORLD.Get_size() > 1:
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)  # the launcher ends the others


def wait_for_rank_0(seconds: float = 3.0) -> None:
    """Lets rank 0 report an error that all ranks have: it then ends the job before this returns."""
    if launched_if_known().rank != 0:
        time.sleep(seconds)
