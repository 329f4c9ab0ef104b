"""Shards of TFRecords, `train-*` and `validation-*`, as a source. An index has a line "offset size" for each record."""

import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nvcnn.data.shard_source import ShardSource, does_not_fit
from nvcnn.data.tfrecord import FRAMING, decode_example, masked_crc, scan
from nvcnn.program import InputError

PATTERNS = {"train": ("train-*",), "validation": ("validation-*",)}
IMAGE, LABEL = "image/encoded", "image/class/label"


class Records(ShardSource):
    patterns = PATTERNS
    header = ""
    line = re.compile(r"(\d+) (\d+)")

    @staticmethod
    def scan(shard: Path) -> Iterator[str]:
        return (f"{offset} {size}" for offset, size in scan(shard))

    @staticmethod
    def check_end(shard: Path, last: Sequence[int]) -> None:
        if sum(last) != shard.stat().st_size:
            raise does_not_fit(shard, sum(last))

    def name(self, i: int) -> str:
        shard, _, (offset, _) = self.locate(i)
        return f"{shard}: the record at byte {offset}"

    def place(self, info: str) -> str:
        return re.sub(r" at index (\d+)$", r": the record at byte \1", info)

    def read(self, i: int) -> tuple[bytes, int | str]:
        (framed,) = self.read_pieces(i)
        data = framed[12:-4]
        if struct.unpack("<QI", framed[:12]) != (len(framed) - FRAMING, masked_crc(framed[:8])):
            raise InputError(f"{self.name(i)} is not one: the index is of another file (delete it, it is built anew)")
        if struct.unpack("<I", framed[-4:])[0] != masked_crc(data):
            raise InputError(f"{self.name(i)} is damaged (its CRC differs): copy or make the file again")
        return parse(data, self.name(i))

    def reader(self, dali: Any, order: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        import nvidia.dali.tfrecord as tf

        shards, indexes, order = self.dali_files(order)
        features = {IMAGE: tf.FixedLenFeature([], tf.string, ""), LABEL: tf.FixedLenFeature([1], tf.int64, -1)}
        record = dali.fn.readers.tfrecord(path=shards, index_path=indexes, features=features, **order, **options)
        return record[IMAGE], record[LABEL]

    def labels(self, output: Any) -> list[int | str]:
        return output.as_array().reshape(-1).tolist()


def parse(data: bytes, name: str) -> tuple[bytes, int]:
    """Returns image and label of a record. Raises InputError, which starts with `name`, unless it has one of each."""
    try:
        example = decode_example(data)
    except ValueError as error:
        raise InputError(f"{name} is {error}: prepare the data set again") from None
    for feature, kind in ((IMAGE, bytes), (LABEL, int)):
        values = example.get(feature, ())
        if len(values) != 1 or not isinstance(values[0], kind):
            raise InputError(f"{name} has no {feature}: prepare the data set again")
    return example[IMAGE][0], example[LABEL][0]
