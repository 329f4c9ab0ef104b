"""Reads and decodes samples with Pillow to find bad ones: before a run, or the one that DALI could not name."""

import time
from collections.abc import Iterable

from nvcnn.data import pillow
from nvcnn.data.dataset import Dataset
from nvcnn.data.pillow import REPLACE, undecodable
from nvcnn.data.source import Source
from nvcnn.program import InputError, here

SEARCH_TIME = 120.0  # seconds; the other ranks wait


def fault(dataset: Dataset, source: Source, i: int, images: bool, advice: str = "") -> str | None:
    """Returns what is wrong with a sample that is unreadable, damaged or labelled outside the classes.

    images: decodes it as well. advice: what to do about an image that cannot be decoded.
    """
    here.moves += 1
    try:
        data, label = source.read(i)
        dataset.zero_based(label, source.name(i))
        if images:
            pillow.decode(data)
    except InputError as error:
        return str(error)
    except ValueError as error:
        return undecodable(source.name(i), str(error)) + advice
    return None


def bad_samples(dataset: Dataset, split: str, samples: Iterable[int], images: bool) -> list[tuple[int, str]]:
    """Returns (number, what is wrong) of the bad ones among some samples."""
    source = dataset.source(split)
    return [(i, wrong) for i in samples if (wrong := fault(dataset, source, i, images))]


def first_fault(dataset: Dataset, split: str, images: bool) -> str | None:
    """Returns the message about the first bad sample; None if there is none."""
    pillow.require_pillow()
    end = time.monotonic() + SEARCH_TIME
    source = dataset.source(split)
    for i in range(len(source)):
        if wrong := fault(dataset, source, i, images, REPLACE):
            return wrong
        if time.monotonic() > end:
            return (
                f"{source.name(0)} and what follows it: a sample cannot be used; "
                f"the first {i + 1} can: --check_data=images finds it"
            )
    return None
