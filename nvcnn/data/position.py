"""Where in the data a run is: the rule of epochs, each rank's share, seeds, what a resumed run must find again."""

import hashlib
from typing import Any

from nvcnn.data.dataset import Dataset
from nvcnn.program import InputError


def derived_seed(*parts: int | str) -> int:
    """A 31-bit seed for one purpose; other parts give an unrelated one."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def share(images: int, rank: int, ranks: int) -> range:
    """A rank's share of an evaluation: over all ranks each image once."""
    return range(images * rank // ranks, images * (rank + 1) // ranks)


def check_position(dataset: Dataset, batch_size: int, ranks: int, state: dict[str, Any] | None, reader: str) -> int:
    """Steps of an epoch: full batches of all ranks.

    Raises InputError when there is not one, or when `state`, a position to resume at, is of other data or of another
    kind of reader ("dali" or "torch").
    """
    images, total = dataset.images("train"), batch_size * ranks
    if images < total:
        raise InputError(
            f"--data_dir={dataset.directory}: {images} training images are fewer than one total batch of {total} "
            f"({ranks} ranks x --batch_size={batch_size}): lower --batch_size"
        )
    if state is not None and state.get("images") != images:
        raise InputError(
            f"--data_dir={dataset.directory}: {images} training images, but the run to resume had "
            f"{state.get('images', 'synthetic ones')}: give its data, or another --log_dir"
        )
    if state is not None and state.get("backend", "dali") != reader:
        raise InputError(
            f"--data_backend: the run to resume read its images by {state.get('backend', 'dali')}, this one by "
            f"{reader}: give its --data_backend, or another --log_dir"
        )
    return images // total
