"""What a kind of files must offer to be trained and evaluated from, whatever backend reads it."""

from collections.abc import Collection
from typing import Any, Protocol

from nvcnn.program import InputError

# What the folders and shards of a split are called. A test set is one to validate on where there is no other.
VALIDATION = ("val", "validation", "valid")
NAMES = {"train": ("train",), "validation": (*VALIDATION, "test")}


class NoSplit(InputError):
    """A data directory has no samples for training, or none for validation."""


class Source(Protocol):
    """The samples of one split, 0 .. len - 1, in the order of their files."""

    def __len__(self) -> int: ...

    def read(self, i: int) -> tuple[bytes, int | str]:
        """Returns encoded image and label, as stored; a label that is not a number as text.

        Raises InputError, which starts with the sample's name, if it cannot be read.
        """

    def name(self, i: int) -> str:
        """Returns file and record of a sample, for messages."""

    def place(self, info: str) -> str:
        """Returns the same, made from what DALI's reader says of a sample."""

    def number(self, place: str) -> int:
        """Returns the sample of which `place` is such a text."""

    def firsts(self) -> list[int]:
        """Returns the samples whose labels are checked before a run."""

    def digest(self) -> str:
        """Returns a digest of which samples these are: the same for a copy in another place."""

    def without(self, left_out: Collection[int]) -> "Source":
        """Returns this source without some of its samples."""

    def reader(self, dali: Any, order: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        """Returns DALI's reader of these samples: encoded image, and label for `labels`.

        order: `shuffle_after_epoch` and its seed for training, `stick_to_shard` for evaluation.
        """

    def labels(self, output: Any) -> list[int | str]:
        """Returns the labels, as stored, of a batch of the reader; a label that is not a number as text."""


def is_utf_8(path: str) -> bool:
    return path.isascii() or path.encode(errors="ignore").decode() == path


def for_dali(paths: list[str]) -> list[str]:
    """Returns the paths. Raises InputError for one that is not UTF-8, as DALI takes no other."""
    for path in paths:
        if not is_utf_8(path):
            raise InputError(f"{path}: DALI takes names in UTF-8 alone: rename it, or give --data_backend=torch")
    return paths
