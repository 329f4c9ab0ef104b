"""Processes that share the work of this one."""

import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from ctypes import CDLL
from multiprocessing import get_context
from typing import Any

from nvcnn.program import InputError

PR_SET_PDEATHSIG = 1  # linux/prctl.h

task: Any = None  # in a worker: the function of its pool


@contextmanager
def worker_pool(workers: int, function: Callable[..., Any] | None = None) -> Iterator[ProcessPoolExecutor]:
    """Yields a pool of processes that ignore Ctrl-C and finish their work, but end at once when this one is killed.

    function: what `forked` calls in a worker. It is there by fork and not sent, however much it holds.
    Raises InputError when a worker is killed.
    """
    gc.collect()  # a worker that collected a DALI pipeline would wait for threads that it does not have
    arguments = os.getpid(), function
    try:
        pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=begin_worker, initargs=arguments)
    except OSError as error:
        raise cannot_start(error) from None
    try:
        yield pool
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, perhaps for lack of memory: give the same command again, with more memory or "
            f"fewer workers than {workers} (prepare.py --workers; train.py and eval.py have one for each core)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def cannot_start(error: OSError) -> InputError:
    return InputError(f"worker processes cannot be started ({error.strerror}): free memory, and files in /dev/shm")


def forked(*arguments: Any) -> Any:
    return task(*arguments)


def begin_worker(parent: int, function: Callable[..., Any] | None) -> None:
    global task
    task = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with(parent)
    if "torch" in sys.modules:  # OpenMP's threads are not forked: it would wait for them for ever
        sys.modules["torch"].set_num_threads(1)
    gc.freeze()  # a collection would write to every object, and so end the sharing of memory
    warnings.filterwarnings("ignore", module="PIL")  # what matters is an error here


def end_with(parent: int) -> None:
    """Has this process end at once when its parent does, whatever it waits for."""
    CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
