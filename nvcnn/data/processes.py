"""Processes that share the work of this one, and how far they are."""

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

import torch

from nvcnn.program import InputError

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
    torch.set_num_threads(1)  # OpenMP's threads are not forked: a region of many would wait for them for ever
    gc.freeze()  # a collection would write to every name and place of the data set, and end the sharing of their memory
    warnings.filterwarnings("ignore", module="PIL")  # what matters of it is an error here


@contextmanager
def progress(images: int) -> Iterator[Callable[[int, str, list[str]], None]]:
    """A bar with the time left on a terminal with tqdm, else a line per shard; what is wrong is printed either way.

    Yields what is to be called after each shard with its number of images, its line, and what is wrong with it.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None  # type: ignore[assignment, misc]
    if tqdm is not None and sys.stderr.isatty():
        with tqdm(total=images, unit="image", dynamic_ncols=True) as bar:

            def update(n: int, line: str, wrong: list[str]) -> None:
                for text in wrong:
                    bar.write(text)
                bar.update(n)

            yield update
    else:
        yield lambda n, line, wrong: print(*wrong, line, sep="\n", flush=True)
