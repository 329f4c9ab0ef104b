"""Epochs: how many steps they have, which samples are a rank's, seeds, and what a resumed run must find again."""

import hashlib
from typing import Any

from nvcnn.data.dataset import Dataset
from nvcnn.data.options import TrainingOptions
from nvcnn.program import InputError


def derived_seed(*parts: int | str) -> int:
    """Returns a 31-bit seed for one purpose. Other parts give an unrelated one."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def share(images: int, rank: int, ranks: int) -> range:
    """Returns a rank's share of an evaluation. All shares together hold each image once."""
    return range(images * rank // ranks, images * (rank + 1) // ranks)


def check_position(dataset: Dataset, options: TrainingOptions, state: dict[str, Any] | None, reader: str) -> int:
    """Returns the batches of an epoch, which are full on all ranks, and of whole steps.

    Raises InputError when there is not one, or when `state`, the position to resume at, belongs to other data or to
    another kind of reader ("dali" or "torch").
    """
    images, total = dataset.count("train"), options.batch_size * options.ranks * options.accumulate
    flag = f"--data_dir={dataset.directory}"
    if images < total:
        raise InputError(
            f"{flag}: {images} training images are fewer than one total batch of {total} "
            f"({options.ranks} ranks x --batch_size={options.batch_size}"
            f"{f' x --accumulate={options.accumulate}' * (options.accumulate > 1)}): lower --batch_size"
        )
    if state is not None and state.get("images") != images:
        raise InputError(
            f"{flag}: {images} training images, but the run to resume had {state.get('images', 'synthetic ones')}: "
            "give its data, or another --log_dir"
        )
    if state is not None and state.get("backend", "dali") != reader:
        raise InputError(
            f"--data_backend: the run to resume read its images by {state.get('backend', 'dali')}, this one by "
            f"{reader}: give its --data_backend, or another --log_dir"
        )
    return images // total * options.accumulate
