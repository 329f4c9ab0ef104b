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

from nvcnn.errors import InputError

PR_SET_PDEATHSIG = 1  # linux/prctl.h

task: Any = None  # of a worker, what its pool was made for


@contextmanager
def worker_pool(workers: int, function: Callable[..., Any] | None = None) -> Iterator[ProcessPoolExecutor]:
    """Processes that leave Ctrl-C to this one and finish what they are at, but end at once when this one is killed.

    function: for `forked`, which calls it in a worker; however much it holds, it is not sent there.
    Raises InputError when one of them is killed.
    """
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=begin_worker, initargs=(os.getpid(), function))
    try:
        yield pool
    except BrokenProcessPool:
        raise InputError(
            "a worker process was killed, perhaps for want of memory: give the same command again, with more memory or "
            f"fewer workers than {workers} (prepare.py --workers)"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def forked(*arguments: Any) -> Any:
    return task(*arguments)


def begin_worker(parent: int, function: Callable[..., Any] | None) -> None:
    global task
    task = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    if "torch" in sys.modules:  # OpenMP's threads are not forked: a region of many would wait for them for ever
        sys.modules["torch"].set_num_threads(1)
    gc.freeze()  # a collection would write to every name and place of the data set, and end the sharing of their memory
    warnings.filterwarnings("ignore", module="PIL")  # what matters of it is an error here
