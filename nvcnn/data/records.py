"""Shards of TFRecords, `train-*` and `validation-*`, each with an index beside it, as a source."""

import re
import struct
import sys
import tempfile
from collections.abc import Collection
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvcnn.data.source import Files, same_everywhere
from nvcnn.data.tfrecord import FRAMING, decode_example, index_path, masked_crc, scan, write_index
from nvcnn.program import InputError

IMAGE, LABEL = "image/encoded", "image/class/label"


class Records:
    def __init__(self, shards: list[Path], left_out: Collection[int] = ()):
        self.shards = shards
        self.left_out = sorted(left_out)
        self.files = Files()

    @cached_property
    def lines(self) -> list[int]:
        """How many records each shard's index has."""
        return [index_path(shard).read_bytes().count(b"\n") for shard in self.shards]

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def table(self) -> Tensor:
        """(samples, 3) int64: shard, offset, size. A tensor, because worker processes share its memory."""
        parts = []
        for n, shard in enumerate(self.shards):
            numbers = torch.tensor(list(map(int, index_path(shard).read_bytes().split())), dtype=torch.int64).view(
                -1, 2
            )
            parts.append(torch.cat([torch.full((len(numbers), 1), n), numbers], 1))
        kept = torch.ones(sum(map(len, parts)), dtype=torch.bool)
        kept[self.left_out] = False
        return torch.cat(parts)[kept]

    def firsts(self) -> list[int]:
        """The first sample of each shard that has any."""
        return [first for first, n in zip(accumulate(self.lines, initial=0), self.lines, strict=False) if n]

    def name(self, i: int) -> str:
        shard, offset, _ = self.table[i].tolist()
        return self.place(f"{self.shards[shard]} at index {offset}")

    def place(self, info: str) -> str:
        return re.sub(r" at index (\d+)$", r": the record at byte \1", info)

    def read(self, i: int) -> tuple[bytes, int | str]:
        shard, offset, size = self.table[i].tolist()
        framed = self.files.read(self.shards[shard], offset, size, lambda: self.name(i))
        data = framed[12:-4]
        if struct.unpack("<QI", framed[:12]) != (size - FRAMING, masked_crc(framed[:8])):
            raise InputError(f"{self.name(i)} is none: the index is of another file (delete it, it is built anew)")
        if struct.unpack("<I", framed[-4:])[0] != masked_crc(data):
            raise InputError(f"{self.name(i)} is damaged (its CRC differs): copy or make the file again")
        return parse(data, self.name(i))

    def without(self, left_out: Collection[int]) -> "Records":
        if self.left_out:
            raise ValueError("samples are left out already: numbers would be of another list")
        return Records(self.shards, left_out)

    def reader(self, dali: Any, order: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        import nvidia.dali.tfrecord as tf

        record = dali.fn.readers.tfrecord(
            path=list(map(str, self.shards)),
            index_path=list(map(str, self.indexes)),
            features={
                IMAGE: tf.FixedLenFeature([], tf.string, ""),
                LABEL: tf.FixedLenFeature([1], tf.int64, -1),
            },
            **same_everywhere(order, buffer=True),
            **options,
        )
        return record[IMAGE], record[LABEL]

    def labels(self, output: Any) -> list[int | str]:
        return output.as_array().reshape(-1).tolist()

    @cached_property
    def indexes(self) -> list[Path]:
        """Of what is left when samples are left out: index files of their own, for as long as this source is there."""
        if not self.left_out:
            return list(map(index_path, self.shards))
        self.directory = tempfile.TemporaryDirectory(prefix="nvcnn-")
        indexes = []
        firsts = list(accumulate(self.lines, initial=0))
        skipped = set(self.left_out)
        for n, shard in enumerate(self.shards):
            lines = index_path(shard).read_text().splitlines(keepends=True)
            indexes.append(Path(self.directory.name) / f"{n}.idx")
            indexes[-1].write_text("".join(line for i, line in enumerate(lines, firsts[n]) if i not in skipped))
        return indexes


def parse(data: bytes, name: str) -> tuple[bytes, int]:
    """Image and label of a record. Raises InputError, which starts with `name`, when it has not one of each."""
    try:
        example = decode_example(data)
    except ValueError as error:
        raise InputError(f"{name} is {error}: prepare the data set again") from None
    for feature, kind in ((IMAGE, bytes), (LABEL, int)):
        values = example.get(feature, ())
        if len(values) != 1 or not isinstance(values[0], kind):
            raise InputError(f"{name} has no {feature}: prepare the data set again")
    return example[IMAGE][0], example[LABEL][0]


def open_records(directory: Path, split: str, lenient: bool) -> Records:
    """The shards of a split, in order of name; indexes are checked, missing ones are built.

    Raises InputError for what is not right. lenient: what a check of every record finds as well is left to that.
    """
    shards = sorted(p for p in directory.glob(f"{split}-*") if p.suffix != ".idx" and not p.is_dir())
    if not shards:
        raise InputError(f"--data_dir={directory}: no {split}-* files: prepare the data set, or correct the path")
    for shard in shards:
        check_index(shard, lenient)
    return Records(shards)


def check_index(shard: Path, lenient: bool = False) -> None:
    """Builds the shard's index if it has none; raises InputError if it is not that of this shard."""
    index = index_path(shard)
    if not index.exists():
        print(f"{shard}: no index, building it", file=sys.stderr, flush=True)
        records = list(scan(shard))
        try:
            write_index(shard, records)
        except OSError as error:
            raise InputError(
                f"{index}: is missing and cannot be written ({error.strerror}): make {shard.parent} writable once"
            ) from None
    text = index.read_bytes()
    size = shard.stat().st_size
    if not re.fullmatch(rb"(\d+ \d+\n)*", text):
        raise InputError(f"{index}: is not an index of lines 'offset size': delete it, it is built anew")
    if lenient:
        return
    end = sum(map(int, text[text[:-1].rfind(b"\n") + 1 :].split()))
    if end != size:
        raise InputError(
            f"{index}: ends at byte {end}, but {shard} has {size} bytes: the shard is truncated (copy it again) "
            "or the index is of another file (delete it, it is built anew)"
        )
