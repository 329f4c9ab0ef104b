"""Random images, made once on the device: for speed tests, and for a first run without data."""

from typing import Any

import torch

from nvcnn.data.batch import Batch
from nvcnn.program import InputError


class SyntheticData:
    """One random batch without end, with the interface of TrainingData. An epoch is `images` images of all ranks."""

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
        self.steps_per_epoch = images // (batch_size * ranks)
        if self.steps_per_epoch == 0:
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

    def __iter__(self) -> "SyntheticData":
        return self

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dictionary, since every position is the same."""
        return {}

    def close(self) -> None:
        pass
