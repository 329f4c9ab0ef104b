"""MixUp and CutMix: how the images of a batch are mixed with each other, and their labels with them.

MixUp (Zhang et al. 2017, arXiv:1710.09412) blends two images; CutMix (Yun et al. 2019, arXiv:1905.04899) replaces a
box of one by that of the other. As timm has it, all images of a batch are mixed in the same way, each with that of the
batch in reverse order.
"""

import math
import random
from dataclasses import dataclass

import torch

from nvcnn.data.batch import Batch, MixedBatch
from nvcnn.data.epochs import derived_seed


@dataclass(frozen=True)
class Mixing:
    """Draws from the seed, the rank and the number of a batch alone. mixup, cutmix: alphas, one of which may be 0."""

    mixup: float
    cutmix: float
    seed: int
    rank: int

    def __call__(self, batch: Batch, number: int) -> MixedBatch:
        """Returns the batch with what it is mixed by. Nothing waits for the device."""
        device = batch.images.device
        mix = torch.tensor(self.draw(number, *batch.images.shape[1:3]), pin_memory=device.type == "cuda")
        return MixedBatch(*batch, mix.to(device, non_blocking=True))

    def draw(self, number: int, h: int, w: int) -> list[float]:
        """Returns the values of `mix` for images of h x w."""
        generator = random.Random(derived_seed(self.seed, self.rank, "mix", number))
        cuts = self.cutmix and (not self.mixup or generator.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        share = generator.betavariate(alpha, alpha)
        if not cuts:
            return [share, share, 0, 0, 0, 0]
        top, bottom = span(h, math.sqrt(1 - share), generator)
        left, right = span(w, math.sqrt(1 - share), generator)
        return [1 - (bottom - top) * (right - left) / (h * w), 1, top, bottom, left, right]


def span(side: int, part: float, generator: random.Random) -> tuple[int, int]:
    """Returns begin and end of that part of a side about a random pixel, as far as it is inside."""
    half, middle = int(side * part) // 2, generator.randrange(side)
    return max(middle - half, 0), min(middle + half, side)
