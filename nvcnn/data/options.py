"""What a reader must know to make batches, whichever backend it uses."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class ReaderOptions:
    batch_size: int  # of each rank
    image_size: int  # pixels of a side
    rank: int
    ranks: int
    device: torch.device  # where the batches are
    threads: int  # or worker processes


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(ReaderOptions):
    crop_area: tuple[float, float]  # range of a crop's share of the image's area
    crop_aspect: tuple[float, float]  # range of its width / height
    seed: int
    later_sizes: tuple[tuple[int, int], ...] = ()  # an epoch, counted from 0, and the image_size from then on

    def size_in(self, epoch: int) -> int:
        """Returns the size of that epoch's images."""
        return [self.image_size, *(size for first, size in self.later_sizes if first <= epoch)][-1]

    accumulate: int = 1  # batches of a step, of which an epoch has whole ones


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(ReaderOptions):
    crop: float  # a share, in the middle of the image:
    aspect: str  # "stretch": of height and of width, which become a square; "keep": a square, of the shorter side
    interpolation: str  # "bilinear" or "bicubic"
