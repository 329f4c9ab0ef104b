"""Random images, made once on the device: for speed tests, and for a first run without data."""

from typing import Any

import torch

from nvcnn.data.batch import Batch
from nvcnn.program import InputError


class SyntheticData:
    """One random batch without end, with the interface of TrainingData. An epoch is `images` images of all ranks.

    Images carry their class, so that there is something to learn: of each pixel seven bits are random, and the highest
    is one of the class's number. Each bit of that has rows of its own, which a mirror leaves as they are.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        image_size: int,
        num_classes: int,
        images: int,
        seed: int,
        device: torch.device,
        ranks: int = 1,
    ) -> None:
        self.images = images
        self.batches_per_epoch = images // (batch_size * ranks)
        if self.batches_per_epoch == 0:
            raise InputError(
                f"--batch_size={batch_size}: a total batch of {batch_size * ranks} is more than the {images} images: "
                "lower it"
            )
        generator = torch.Generator(device).manual_seed(seed)
        size = (batch_size, image_size, image_size, 3)
        self.batch = Batch(
            torch.randint(256, size, dtype=torch.uint8, device=device, generator=generator),
            torch.randint(num_classes, (batch_size,), device=device, generator=generator),
            torch.randint(2, (batch_size,), device=device, generator=generator).bool(),
        )
        row = torch.arange(image_size, device=device) * num_classes.bit_length() // image_size
        bits = (self.batch.labels[:, None] >> row & 1).to(torch.uint8)
        self.batch.images.bitwise_and_(127).bitwise_or_(bits[:, :, None, None] << 7)

    def __iter__(self) -> "SyntheticData":
        return self

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dictionary, since every position is the same."""
        return {}

    def close(self) -> None:
        pass
