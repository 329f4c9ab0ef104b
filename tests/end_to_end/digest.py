"""Runs tiny.py, and each rank says at the end what it holds: a digest of weights and momentum."""

import hashlib

import tiny  # noqa: F401 (the model)
import torch

from nvcnn import train
from nvcnn.program import run
from nvcnn.settings import Settings, parse


class Digested(train.Run):
    def loop(self) -> int:
        code = super().loop()
        held = hashlib.sha256()
        arena, optimizer = self.train_step.arena, self.train_step.optimizer
        for tensor in (arena.weight, arena.momentum, optimizer.counters, optimizer.loss_scale):
            held.update(tensor.view(torch.uint8).numpy().tobytes())
        print(f"rank {self.transport.rank} holds {held.hexdigest()}", flush=True)
        return code


if __name__ == "__main__":
    train.Run = Digested
    run(lambda: train.train(parse(Settings)))
