"""Shards of TFRecords as a source: `train-*`, `validation-*`, or of `val`, `valid` and `test` what looks like a shard.

An index has a line "offset size" for each record.
"""

import re
import struct
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Self

from nvcnn.data.shard_source import PLACE, ShardSource, does_not_fit, index_path
from nvcnn.data.tfrecord import FRAMING, decode_example, masked_crc, scan
from nvcnn.program import InputError

IMAGE, LABEL = "image/encoded", "image/class/label"
SMALL = 1024  # bytes, framing included, of a record that may well have no image
ONE_IMAGE = re.compile(  # a Feature of bytes, of which there is one at least
    IMAGE.encode() + rb"\x12[\x80-\xff]*[\1-\x7f]\n[\x80-\xff]*[\1-\x7f]\n"
)


class Records(ShardSource):
    header = ""
    line = re.compile(rf"{PLACE} {PLACE}")

    @staticmethod
    def patterns(name: str) -> list[str]:
        """Returns narrower ones for names that other files have, too, as test-notes.md."""
        return [f"{name}-*"] if name in ("train", "validation") else [f"{name}-*-of-*", f"{name}-*.tfrecord"]

    @classmethod
    def find(cls, directory: Path, split: str, lenient: bool = False) -> Self:
        """Also looks for an image in each small record: DALI crashes where the list is empty."""
        source = super().find(directory, split, lenient)
        sizes = () if lenient else chain.from_iterable(numbers[1::2] for numbers in source.places)
        for i, size in enumerate(sizes):
            if size <= SMALL and not ONE_IMAGE.search(source.read_pieces(i)[0]):
                source.read(i)
        return source

    @staticmethod
    def scan(shard: Path) -> Iterator[str]:
        return (f"{offset} {size}" for offset, size in scan(shard))

    @staticmethod
    def check_index(shard: Path, numbers: Sequence[int], lenient: bool) -> None:
        *starts, end = accumulate(numbers[1::2], initial=0)
        size = shard.stat().st_size
        if list(numbers[::2]) != starts or end < size:
            raise InputError(f"{index_path(shard)}: is not all of {shard}, part by part: delete it, it is built anew")
        if end > size and not lenient:
            raise does_not_fit(shard, end)

    def name(self, i: int) -> str:
        shard, _, (offset, _) = self.locate(i)
        return f"{shard}: the record at byte {offset}"

    def place(self, info: str) -> str:
        return re.sub(r" at index (\d+)$", r": the record at byte \1", info)

    def read(self, i: int) -> tuple[bytes, int | str]:
        (framed,) = self.read_pieces(i)
        data = framed[12:-4]
        announced = len(data), masked_crc(framed[:8])
        if len(framed) < FRAMING or struct.unpack("<QI", framed[:12]) != announced:
            raise InputError(f"{self.name(i)} is not one: the index is of another file (delete it, it is built anew)")
        if struct.unpack("<I", framed[-4:])[0] != masked_crc(data):
            raise InputError(f"{self.name(i)} is damaged (its CRC differs): copy or make the file again")
        return parse(data, self.name(i))

    def reader(self, dali: Any, order: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        import nvidia.dali.tfrecord as tf

        shards, indexes, order = self.dali_files(order)
        # A label of fixed length would be uninitialised memory where the list is empty.
        features = {IMAGE: tf.FixedLenFeature([], tf.string, ""), LABEL: tf.VarLenFeature(tf.int64, -1)}
        record = dali.fn.readers.tfrecord(path=shards, index_path=indexes, features=features, **order, **options)
        return record[IMAGE], record[LABEL]

    def labels(self, output: Any) -> list[int | str]:
        if output.is_dense_tensor() and (numbers := output.as_array()).shape[1:] == (1,):
            return numbers[:, 0].tolist()
        found = (output.at(i) for i in range(len(output)))
        return [number(label.tolist() if label.ndim else []) for label in found]  # of no dimensions: none is stored


def parse(data: bytes, name: str) -> tuple[bytes, int | str]:
    """Returns image and label of a record. Raises InputError, which starts with `name`, unless it has one image."""
    try:
        example = decode_example(data)
    except ValueError as error:
        raise InputError(f"{name} is {error}: prepare the data set again") from None
    images = [value for value in example.get(IMAGE, ()) if isinstance(value, bytes)]
    if len(images) != 1:
        raise InputError(f"{name} has {len(images) or 'no'} {IMAGE}: prepare the data set again")
    return images[0], number([value for value in example.get(LABEL, ()) if isinstance(value, int)])


def number(label: list[int]) -> int | str:
    """Returns the number that a list of labels is, or its text when it is not one number."""
    return label[0] if len(label) == 1 else ", ".join(map(str, label))
