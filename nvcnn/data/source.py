"""What a kind of files must offer to be trained and evaluated from, whatever backend reads it."""

import os
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from nvcnn.program import InputError

OPEN_FILES = 128  # per process; the usual limit of 1024 is also for sockets, libraries and the rest
SHUFFLE_BUFFER = 4096  # images; shards are shuffled when they are made, this mixes them anew in each epoch


class Source(Protocol):
    """The samples of one split, 0 .. len - 1, in the order of their files."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> tuple[bytes, int | str]:
        """Encoded image and label, as stored; a label that is no number as text.

        Raises InputError, which starts with the sample's name, if it cannot be read.
        """

    def name(self, i: int) -> str:
        """File and record of a sample, for messages."""

    def place(self, info: str) -> str:
        """The same from what DALI's reader says of a sample."""

    def without(self, left_out: Collection[int]) -> "Source":
        """This source without some of its samples."""

    def reader(self, dali: Any, order: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        """DALI's reader of these samples: encoded image and label, for `labels`.

        order: `shuffle_after_epoch` and its seed for training, `stick_to_shard` for evaluation.
        """

    def labels(self, output: Any) -> list[int | str]:
        """The labels, as stored, of a batch of the reader; a label that is no number as text."""


class Files:
    """Reads pieces of files, and keeps the files open that were read last."""

    def __init__(self) -> None:
        self.open = lru_cache(OPEN_FILES)(self._open)

    def __reduce__(self) -> tuple[type["Files"], tuple[()]]:
        return Files, ()  # another process opens its own

    @staticmethod
    def _open(path: Path) -> BinaryIO:
        return open(path, "rb", buffering=0)

    def read(self, path: Path, offset: int, size: int, name: Callable[[], str]) -> bytes:
        """Raises InputError, which starts with `name()`, when the file cannot be read or has no such bytes."""
        try:
            data = os.pread(self.open(path).fileno(), size, offset)
        except OSError as error:
            raise InputError(f"{name()} cannot be read ({error.strerror}): copy or make the data set again") from None
        if len(data) != size:
            raise InputError(f"{name()} cannot be read (the file ends before): copy or make the data set again")
        return data


def same_everywhere(order: dict[str, Any], *, buffer: bool) -> dict[str, Any]:
    """A reader's arguments for an order. buffer: the reader only permutes files; a buffer mixes their samples."""
    if buffer and order.get("shuffle_after_epoch"):
        return order | {"random_shuffle": True, "initial_fill": SHUFFLE_BUFFER}
    return order
