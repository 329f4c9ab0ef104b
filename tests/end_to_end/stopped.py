"""Runs launch/prepare.py, but its third shard brings a signal: python stopped.py SIGNAL ARGUMENTS

It begins as in the background of a script, where a shell has Ctrl-C ignored.
"""

import os
import runpy
import signal
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from nvcnn.prepare import write

number, original = int(sys.argv.pop(1)), write.progress


@contextmanager
def progress(images):
    with original(images) as update:
        shard = count(1)

        def counted(*arguments):
            update(*arguments)
            if next(shard) == 3:
                os.kill(os.getpid(), number)

        yield counted


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    write.progress = progress
    runpy.run_path(str(Path(__file__).parents[2] / "launch/prepare.py"), run_name="__main__")
