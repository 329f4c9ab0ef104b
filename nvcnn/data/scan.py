"""Reads and decodes samples with Pillow to find bad ones: before a run, or the one that DALI could not name."""

import time
from collections.abc import Iterable

from nvcnn.data import pillow
from nvcnn.data.dataset import Dataset
from nvcnn.data.pillow import REPLACE, undecodable
from nvcnn.data.source import Source
from nvcnn.program import InputError

SEARCH_TIME = 120.0  # seconds; the other ranks wait


def bad_samples(dataset: Dataset, split: str, samples: Iterable[int], images: bool) -> list[tuple[int, str]]:
    """Returns (number, what is wrong) of the samples that are unreadable, damaged or labelled outside the classes.

    images: decodes them as well.
    """
    source, found = dataset.source(split), []
    for i in samples:
        try:
            data, label = source.read(i)
            dataset.zero_based(label, source.name(i))
            if images:
                pillow.decode(data)
        except InputError as error:
            found.append((i, str(error)))
        except ValueError as error:
            found.append((i, undecodable(source.name(i), str(error))))
    return found


def first_undecodable(source: Source) -> str | None:
    """Returns the message about the first image that Pillow cannot decode or read; None if there is none."""
    pillow.require_pillow()
    end = time.monotonic() + SEARCH_TIME
    for i in range(len(source)):
        try:
            pillow.decode(source.read(i)[0])
        except InputError as error:
            return str(error)
        except ValueError as error:
            return undecodable(source.name(i), str(error)) + REPLACE
        if time.monotonic() > end:
            return (
                f"{source.name(0)} and what follows it: an image cannot be decoded; "
                f"the first {i + 1} can: --check_data=images finds it"
            )
    return None
