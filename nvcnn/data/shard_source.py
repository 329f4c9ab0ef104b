"""Samples in shards, which are files of many samples with an index beside each: what TFRecords and tars share."""

import hashlib
import os
import re
import sys
import tempfile
import uuid
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache, partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, BinaryIO, Self

from nvcnn.data.source import NAMES, NoSplit, for_dali
from nvcnn.files import to_read
from nvcnn.program import InputError

OPEN_FILES = 128  # per process; the usual limit of 1024 is also for sockets, libraries and the rest
PACKED = {b"\x1f\x8b\x08": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK\3\4": "zip"}
PLACE = "([0-9]{1,18})"  # in an index: an offset or a size, of 63 bits
SHUFFLE_BUFFER = 4096  # images; shards are shuffled when they are made, this mixes them anew in each epoch


class ShardSource:
    """The samples of some shards. A subclass is a format: how its files are named, and what a sample holds.

    patterns: returns those of the names of its shards, where a split is called `name`; of NAMES, which has what a split
    may be called, the first with files counts.
    header: what an index begins with, where {} is the number of samples.
    line: a line of an index, one for each sample; its groups are offset and size of each piece of the sample.
    """

    header: str
    line: re.Pattern[str]

    def __init__(self, shards: list[Path], left_out: Collection[int] = ()):
        """left_out: samples that are not there, by their numbers before any is left out."""
        self.shards, self.left_out = shards, frozenset(left_out)
        self.open_file = lru_cache(OPEN_FILES)(partial(open, mode="rb", buffering=0))
        # Arrays, because worker processes share their memory. Reading a list would count references to its objects,
        # which copies its memory into every worker.
        self.places = [array("q", (int(n) for line in self.read_index(s) for n in line.groups())) for s in shards]
        counts = (len(places) // self.line.groups for places in self.places)
        self.starts = list(accumulate(counts, initial=0))  # the number of each shard's first sample
        self.kept: Sequence[int] = range(self.starts[-1])
        if left_out:
            self.kept = array("q", (i for i in self.kept if i not in self.left_out))

    @staticmethod
    def patterns(name: str) -> list[str]:
        raise NotImplementedError

    @classmethod
    def find(cls, directory: Path, split: str, lenient: bool = False) -> Self:
        """Returns the source of a split, in order of name. Raises InputError for what is not right.

        Builds indexes that are missing. lenient: leaves out the checks that a check of every sample makes as well.
        """
        shards: list[Path] = []
        patterns = [cls.patterns(name) for name in NAMES[split]]
        for of_name in patterns:
            files = {path for pattern in of_name for path in directory.glob(pattern)}
            shards = shards or sorted(path for path in files if path.suffix != ".idx" and not path.is_dir())
        if not shards:
            what = " or ".join(chain.from_iterable(patterns))
            raise NoSplit(f"--data_dir={directory}: no {what} files: prepare the data set, or correct the path")
        for shard in shards:
            to_read(shard).stat()  # a link that leads nowhere is an error even if `lenient`
            if not to_read(index_path(shard)).exists():
                cls.build_index(shard)
        source = cls(shards)
        for shard, numbers in zip(shards, source.places, strict=True):
            cls.check_index(shard, numbers, lenient)
        return source

    @staticmethod
    def scan(shard: Path) -> Iterator[str]:
        """Yields the lines that the index of `shard` should have. Raises InputError where the shard is damaged."""
        raise NotImplementedError

    @staticmethod
    def check_index(shard: Path, numbers: Sequence[int], lenient: bool) -> None:
        """Raises InputError unless an index of these numbers accounts for every byte of `shard`.

        lenient: it may have more samples than the shard.
        """
        raise NotImplementedError

    @classmethod
    def build_index(cls, shard: Path) -> None:
        print(f"{shard}: no index, building it", file=sys.stderr, flush=True)
        size = shard.stat().st_size
        try:
            text = cls.index_text(list(cls.scan(shard)))
        except InputError:
            with open(shard, "rb") as file:
                packed = next((name for magic, name in PACKED.items() if file.peek().startswith(magic)), None)
            if packed:
                raise InputError(
                    f"{shard}: is compressed by {packed}: unpack it, as samples are read where they lie"
                ) from None
            raise
        if shard.stat().st_size != size:
            raise InputError(f"{shard}: has changed while its index was made: give the command again when it is whole")
        try:
            with atomic_writer(index_path(shard)) as file:
                file.write(text.encode())
        except OSError as error:
            raise InputError(
                f"{index_path(shard)}: is missing and cannot be written ({error.strerror}): make {shard.parent} "
                "writable once"
            ) from None

    @classmethod
    def index_text(cls, lines: Sequence[str]) -> str:
        """Returns the text of an index of these lines."""
        return cls.header.format(len(lines)) + "".join(f"{line}\n" for line in lines)

    @classmethod
    def read_index(cls, shard: Path) -> list[re.Match[str]]:
        """Returns the lines of the shard's index. Raises InputError when the file is not an index of this format."""
        text = index_path(shard).read_text("utf-8", "replace")
        lines = text.splitlines()[cls.header.count("\n") :]
        found = [match for match in map(cls.line.fullmatch, lines) if match]
        if len(found) < len(lines) or text != cls.index_text(lines):
            raise InputError(f"{index_path(shard)}: is not an index of such shards: delete it, it is built anew")
        return found

    def __len__(self) -> int:
        return len(self.kept)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.shards, self.left_out)  # another process opens files of its own

    def locate(self, i: int) -> tuple[Path, int, Sequence[int]]:
        """Returns the shard of sample i, the line of its index, and the numbers there."""
        number, width = self.kept[i], self.line.groups
        shard = bisect_right(self.starts, number) - 1
        line = number - self.starts[shard]
        return self.shards[shard], line, self.places[shard][line * width : (line + 1) * width]

    def name(self, i: int) -> str:
        raise NotImplementedError

    def number(self, place: str) -> int:
        shard = next(n for n, path in enumerate(self.shards) if place.startswith(f"{path}: "))
        line = self.places[shard][:: self.line.groups].index(int(place.rpartition(" ")[2]))
        return bisect_left(self.kept, self.starts[shard] + line)

    def read_pieces(self, i: int) -> list[bytes]:
        """Returns the pieces of sample i. Raises InputError when the file cannot be read or has no such bytes."""
        path, _, numbers = self.locate(i)
        again, pieces = "copy or make the data set again", []
        for offset, size in zip(numbers[::2], numbers[1::2], strict=True):
            try:
                pieces.append(os.pread(self.open_file(path).fileno(), size, offset))
            except (OSError, MemoryError) as error:  # of an index that has not been checked yet
                why = getattr(error, "strerror", f"{size} bytes are too many")
                raise InputError(f"{self.name(i)} cannot be read ({why}): {again}") from None
            if len(pieces[-1]) != size:
                raise InputError(f"{self.name(i)} cannot be read (the file ends before): {again}")
        return pieces

    def firsts(self) -> list[int]:
        """Returns the first sample of each shard that has any, as long as none is left out."""
        return [first for first, end in zip(self.starts, self.starts[1:], strict=False) if first < end]

    def digest(self) -> str:
        found = hashlib.sha256()
        for shard, places in zip(self.shards, self.places, strict=True):
            found.update(os.fsencode(f"{shard.name}\0") + places.tobytes())
        return found.hexdigest()

    def without(self, left_out: Collection[int]) -> Self:
        if self.left_out:
            raise ValueError("samples are left out already: numbers would be of another list")
        return type(self)(self.shards, left_out)

    @cached_property
    def indexes(self) -> list[Path]:
        """The index files for DALI. When samples are left out these are temporary, and go with this source."""
        if not self.left_out:
            return list(map(index_path, self.shards))
        self.directory = tempfile.TemporaryDirectory(prefix="nvcnn-")
        indexes = [Path(self.directory.name) / f"{n}.idx" for n in range(len(self.shards))]
        for index, shard, start in zip(indexes, self.shards, self.starts, strict=False):
            lines = enumerate(self.read_index(shard), start)
            index.write_text(self.index_text([line[0] for i, line in lines if i not in self.left_out]), "utf-8")
        return indexes

    def dali_files(self, order: dict[str, Any]) -> tuple[list[str], list[str], dict[str, Any]]:
        """Returns shards, indexes and order. A shuffled order gets a buffer, since DALI permutes only the shards.

        DALI refuses a shard without samples, so there are none.
        """
        if order.get("shuffle_after_epoch"):
            order = order | {"random_shuffle": True, "initial_fill": SHUFFLE_BUFFER}
        kept = [bisect_left(self.kept, start) for start in self.starts]
        shards, indexes = (
            [str(path) for path, first, end in zip(paths, kept, kept[1:], strict=False) if first < end]
            for paths in (self.shards, self.indexes)
        )
        return for_dali(shards), indexes, order


def index_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".idx")


def does_not_fit(shard: Path, end: int) -> InputError:
    return InputError(
        f"{index_path(shard)}: ends at byte {end}, but {shard} has {shard.stat().st_size} bytes: the shard is "
        "truncated (copy it again) or the index is of another file (delete it, it is built anew)"
    )


@contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that appears under its name complete or not at all. Many processes may write it at once."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
