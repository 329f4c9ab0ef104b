"""A `Blueprint` says where the images of a data set are, which of them go into which file, what becomes of each."""

import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nvcnn.prepare.encode import UnreadableImage
from nvcnn.prepare.formats import FORMATS


class Sample(NamedTuple):
    """An image. It takes some 300 bytes, and nothing else of a data set is kept in memory.

    name: for messages; in a directory also the path below it. label: zero-based.
    source: the tar that holds the image, the directory it is in, or the pixels themselves.
    offset, size: its bytes in the tar. An offset of 0 means a file of its own.
    """

    name: str
    label: int
    source: str | bytes
    offset: int = 0
    size: int = 0


class Shard(NamedTuple):
    """A file to write. first: the number of its first sample in the split."""

    path: Path
    first: int
    samples: list[Sample]


@dataclass(frozen=True)
class Blueprint:
    """A data set to make.

    splits: the images, in an order that depends only on the sources. shards: how many files each split has.
    encode: returns what a worker stores of a sample, and whether it was encoded anew. Raises UnreadableImage.
    order: the seed of the shuffling. flags: those that change what is written, so that a stopped run needs them again.
    files: name and text of files beside the shards.
    """

    title: str
    class_names: tuple[str, ...]
    splits: Mapping[str, list[Sample]]
    shards: Mapping[str, int]
    encode: Callable[[Sample], tuple[bytes, bool]]
    order: str
    file_format: str = "tfrecord"
    flags: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Returns what two runs in one directory must have in common, in JSON's own types."""
        names = hashlib.sha256("\n".join(self.class_names).encode(errors="surrogateescape")).hexdigest()
        shards = ",".join(map(str, self.shards.values()))
        given = {name: value for name, value in self.flags.items() if value is not None}
        return {"dataset": self.title, "format": self.file_format, "shards": shards, **given, "classes": names}

    def shards_in(self, out: Path) -> Iterator[Shard]:
        """Yields the shards, each with its part of the shuffled split."""
        for split, paths in shard_paths(out, self.shards, self.file_format).items():
            samples = self.splits[split]
            order = list(range(len(samples)))
            random.Random(f"{self.order} {split}").shuffle(order)
            for i, path in enumerate(paths):
                first, last = (len(order) * k // len(paths) for k in (i, i + 1))
                yield Shard(path, first, [samples[j] for j in order[first:last]])


def shard_paths(out: Path, shards: Mapping[str, int], file_format: str) -> dict[str, list[Path]]:
    """Returns the files of each split."""
    suffix = FORMATS[file_format].suffix
    return {split: [out / f"{split}-{i:05d}-of-{n:05d}{suffix}" for i in range(n)] for split, n in shards.items()}


def digest(samples: Iterable[Sample]) -> str:
    """Returns the SHA-256 of what a shard is made from: names, labels, sizes, and pixels if they are known."""
    summed = hashlib.sha256()
    for name, label, source, _, size in samples:
        summed.update(f"{name}\0{label}\0{size}\n".encode(errors="surrogateescape"))
        if isinstance(source, bytes):
            summed.update(source)
    return summed.hexdigest()


@lru_cache(maxsize=1)
def opened(path: str) -> BinaryIO:
    """Returns the tar that a worker reads from, opened once."""
    return open(path, "rb", buffering=0)


def read_sample(sample: Sample) -> bytes:
    """Returns the bytes of an image file, from a tar or a directory. Raises UnreadableImage."""
    assert isinstance(sample.source, str)
    try:
        if sample.offset == 0:
            return Path(sample.source, sample.name).read_bytes()
        data = os.pread(opened(sample.source).fileno(), sample.size, sample.offset)
    except OSError as error:
        raise UnreadableImage(f"cannot be read ({error.strerror})") from None
    if len(data) < sample.size:
        raise UnreadableImage(f"ends after {len(data)} of {sample.size} bytes")
    return data
