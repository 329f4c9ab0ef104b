"""Trains LeNet for five steps on fixed tensors, 16 images a step, by this rank alone and shared out over all ranks.

Rank 0 writes the weights before, after those of one, and after those of all.
"""

import sys

import torch
import torch.nn.functional as F

from nvcnn.distributed import Transport, connect
from nvcnn.meta import gradient_order
from nvcnn.models import build_model
from nvcnn.optimizer.arena import Arena
from nvcnn.optimizer.gradients import Gradients
from nvcnn.optimizer.larc import Larc
from nvcnn.optimizer.schedule import poly
from nvcnn.program import Launch


def train(transport: Transport, steps: int) -> dict[str, torch.Tensor]:
    model = build_model("lenet", num_classes=10, seed=1)
    arena = Arena(model, gradient_order(model, 28), device=torch.device("cpu"))
    optimizer = Larc(arena, schedule=poly(0.05, 10), ranks=transport.size, mode="clip", eta=0.01)
    gradients = Gradients(arena, transport, bucket_bytes=1 << 20)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images, labels = torch.randn(16, 3, 28, 28, generator=generator), torch.randint(10, (16,), generator=generator)
        mine = slice(transport.rank * 16 // transport.size, (transport.rank + 1) * 16 // transport.size)
        F.cross_entropy(model(images[mine].contiguous(memory_format=torch.channels_last)), labels[mine]).backward()
        gradients.finish()
        optimizer.step()
    return arena.state_dict()


if __name__ == "__main__":
    alone, together = Transport(Launch()), connect("auto")
    weights = {"start": train(alone, 0), "one": train(alone, 5), "all": train(together, 5)}
    if together.rank == 0:
        torch.save(weights, sys.argv[1])
