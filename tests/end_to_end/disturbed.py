"""Runs launch/train.py, but something happens before a step: python disturbed.py WHAT STEP ARGUMENTS

WHAT: raise (the last rank does), SIGKILL, SIGSTOP or SIGTERM (to the last rank), SIGUSR1 (to mpiexec, which passes it).
"""

import os
import signal
import sys

from nvcnn import train
from nvcnn.program import run
from nvcnn.settings import Settings, parse
from nvcnn.step import Step

what, step = sys.argv.pop(1), int(sys.argv.pop(1))


class Disturbed(Step):
    def __call__(self, batch):
        last = self.transport.rank == self.transport.size - 1
        if last and int(self.optimizer.counters[0]) == step:
            if what == "raise":
                raise RuntimeError(f"step {step}")
            os.kill(os.getppid() if what == "SIGUSR1" else os.getpid(), signal.Signals[what])
        return super().__call__(batch)


if __name__ == "__main__":
    train.Step = Disturbed
    run(lambda: train.train(parse(Settings)))
