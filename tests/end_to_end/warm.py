"""Starts programs in processes that have imported torch already, as imports take most of the time of a short run.

They are forks of a server that has computed nothing, with arguments, environment and exit codes as a shell has them.
"""

import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import forkserver, get_context
from pathlib import Path
from unittest import mock

from nvcnn import watch_ranks

context = get_context("forkserver")
IMPORTED = ("torch._dynamo", "matplotlib.figure", "nvidia.dali.fn", "nvcnn.evaluate", "nvcnn.train")
context.set_forkserver_preload([*IMPORTED, __name__])


def begin(output: Path, directory: Path, environment: dict[str, str], script: Path, arguments: list[str]) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    watch_ranks.PARENT = os.getppid()  # it was another process's when that was imported
    sys.argv, sys.path[0] = [str(script), *arguments], str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


class Warm:
    """Is such a process, with the methods of subprocess.Popen that are needed here."""

    def __init__(self, output: Path, directory: Path, environment: dict[str, str], script: Path, arguments: list[str]):
        with mock.patch.dict(os.environ, environment, clear=True):  # as kernels are imported in the server
            forkserver.ensure_running()
        self.process = context.Process(target=begin, args=(output, directory, environment, script, arguments))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout)
        return self.process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)
