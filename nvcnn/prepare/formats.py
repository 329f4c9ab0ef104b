"""The formats of shards: how TFRecords and tars are written, and how they are read back when they are verified."""

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nvcnn.data.records import Records
from nvcnn.data.shard_source import ShardSource
from nvcnn.data.tars import Tars
from nvcnn.data.tfrecord import FRAMING, encode_example, read_records, write_record

AGAIN = "copy the file again, or delete it and prepare again"


class Image(NamedTuple):
    """What is stored of a sample. key: its number in the split, by which WebDataset names it."""

    key: str
    encoded: bytes
    label: int
    text: bytes


def features(image: Image) -> dict[str, list]:
    """Returns the features of a record, as ImageNet's TFRecords name them. Bounding boxes are unknown."""
    return {
        "image/encoded": [image.encoded],
        "image/class/label": [image.label],
        "image/class/text": [image.text],
        **{f"image/object/bbox/{side}": [] for side in ("xmin", "ymin", "xmax", "ymax")},
    }


def write_tfrecords(file: Any, images: Iterator[Image]) -> list[str]:
    """Returns the lines of the index."""
    lines, at = [], 0
    for image in images:
        size = write_record(file, encode_example(features(image)))
        lines.append(f"{at} {size}")
        at += size
    return lines


def write_webdataset(file: Any, images: Iterator[Image]) -> list[str]:
    """Writes a tar of key.jpg (or .png) and key.cls, the zero-based label in digits. Returns the lines of the index."""
    lines = []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for image in images:
            suffix = "png" if image.encoded.startswith(b"\x89PNG") else "jpg"
            words = []
            for extension, data in ((suffix, image.encoded), ("cls", str(image.label).encode())):
                member = tarfile.TarInfo(f"{image.key}.{extension}")
                member.size = len(data)
                words.append(f"{extension} {tar.offset + tarfile.BLOCKSIZE} {len(data)} {member.name}")
                tar.addfile(member, io.BytesIO(data))
            lines.append(" ".join(words))
    return lines


def read_tfrecords(path: Path, sha256: Any) -> list[str]:
    """Returns the lines of the index that the shard should have. Raises InputError at a damaged record."""
    at, lines = 0, []
    for data in read_records(path, sha256):
        lines.append(f"{at} {len(data) + FRAMING}")
        at += len(data) + FRAMING
    return lines


def read_webdataset(path: Path, sha256: Any) -> list[str]:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return list(Tars.scan(path))


@dataclass(frozen=True)
class Format:
    """write, read: return the lines of a shard's index. label_base: the label of the first class."""

    suffix: str
    label_base: int
    source: type[ShardSource]
    write: Callable[[Any, Iterator[Image]], list[str]]
    read: Callable[[Path, Any], list[str]]


FORMATS = {  # labels as ImageNet has them: in TFRecords 0 is the background
    "tfrecord": Format("", 1, Records, write_tfrecords, read_tfrecords),
    "webdataset": Format(".tar", 0, Tars, write_webdataset, read_webdataset),
}
