"""Runs a program of launch/ in which something happens: python disturbed.py PROGRAM WHAT PLACE NUMBER RANK ARGUMENTS

PROGRAM: train (which has the model `tiny`, with BatchNorm), evaluate or prepare. WHAT happens the NUMBER-th time that
the RANK comes to PLACE: start (when it has met the others), step, save, evaluate (a batch), shard (one is written).
WHAT is one of `EVENTS`, `none`, or a signal, which comes to this process. FAULT names a file that then has the time.
"""

import errno
import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from multiprocessing import active_children
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "NVCNN_FAULT"  # in the environment of all processes of a run: the file of the time, which is the run's own
LARGEST = (
    20_000  # bytes of a file, once the disk is "full": more than metrics.jsonl has, less than a checkpoint or shard
)


def processes(mark: str) -> dict[int, dict[str, str]]:
    """Returns the environments, by process, of those of a run that are alive."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (directory / "environ").read_bytes().decode(errors="replace").split("\0")
            environment = dict(word.split("=", 1) for word in words if "=" in word)
            if environment.get(MARK) == mark and (directory / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found[int(directory.name)] = environment
    return found


def kill_all(mark: str) -> None:
    """Ends all processes of a run at once, this one last if it is one of them."""
    found = sorted(processes(mark), key=lambda pid: pid == os.getpid())
    for number in (signal.SIGSTOP, signal.SIGKILL):  # none has the time to notice that another is gone
        for pid in found:
            if number == signal.SIGKILL or pid != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(pid, number)


def fail() -> None:
    raise RuntimeError("of the harness")


def out_of_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, used))


def kill_worker() -> None:
    for worker in active_children()[:1]:
        os.kill(worker.pid or 0, signal.SIGKILL)
        return
    Path(os.environ[MARK]).unlink()  # it has none: nothing happens


def fill_the_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))


def no_rename() -> None:
    def replace(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.replace = replace


def directory() -> Path:
    return Path(next(word for word in sys.argv if word.startswith(("--log_dir=", "--out="))).partition("=")[2])


def vanish() -> None:
    directory().rename(f"{directory()}.away")


EVENTS: dict[str, Callable[[], object]] = {
    "mpiexec": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "all": lambda: kill_all(os.environ[MARK]),
    "raise": fail,
    "memory": out_of_memory,
    "worker": kill_worker,
    "write": fill_the_disk,
    "rename": no_rename,
    "readonly": lambda: directory().chmod(0o500),
    "vanish": vanish,
}


def arrange(program: str, what: str, place: str, number: int, rank: int) -> None:
    """Has it happen."""
    from nvcnn.program import launched

    if what == "none" or launched().rank != rank:
        return
    times, late = 0, False

    def disturbed(original: Callable) -> Callable:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal times
            result = original(*arguments, **options) if late else None
            times += 1
            if times == number:
                Path(os.environ[MARK]).write_text(str(time.time()))
                EVENTS[what]() if what in EVENTS else os.kill(os.getpid(), signal.Signals[what])
            return result if late else original(*arguments, **options)

        return call

    late = place == "save" and rank == 0 and what not in ("write", "rename")  # all is written, under another name
    if program == "prepare" and place == "start":
        disturbed(lambda: None)()
        return
    if place == "shard":
        from nvcnn.prepare import write

        progress = write.progress

        @contextmanager
        def counted(images: int):
            with progress(images) as update:
                yield disturbed(update)

        write.progress = counted
        return
    from nvcnn import checkpoint, evaluate, step, train

    module: Any = {"train": train, "evaluate": evaluate}[program]
    at: tuple[Any, str] = {
        "start": (module, "check_ranks"),
        "step": (step.Step, "__call__"),
        "save": (checkpoint, "write") if rank == 0 else (train.Run, "save"),
        "evaluate": (evaluate, "prepare_input"),
    }[place]
    setattr(*at, disturbed(getattr(*at)))


def main() -> None:
    program, what, place, number, rank = (sys.argv.pop(1) for _ in range(5))
    from nvcnn import program as start

    run = start.run

    def disturbed(main: Callable[[], int]) -> None:
        def beginning() -> int:  # what takes seconds, where a signal is answered as in the program alone
            arrange(program, what, place, int(number), int(rank))
            if program != "prepare":
                import tests.end_to_end.tiny  # noqa: F401 (the model)
            return main()

        run(beginning)

    start.run = disturbed  # type: ignore[assignment]
    script = ROOT / "launch" / f"{program.replace('evaluate', 'eval')}.py"
    sys.argv[0] = str(script)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
