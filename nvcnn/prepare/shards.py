"""Writes one shard in a worker: TFRecords or a tar, its index, its part of the manifest."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

from nvcnn.data.dataset import UNFINISHED
from nvcnn.data.records import Records
from nvcnn.data.shard_source import ShardSource, atomic_writer, index_path
from nvcnn.data.tars import Tars
from nvcnn.data.tfrecord import encode_example, write_record
from nvcnn.prepare.blueprint import LABEL_BASE, Sample, Shard, digest
from nvcnn.prepare.encode import UnreadableImage
from nvcnn.prepare.manifest import write_json


class Unwritten(Exception):
    """Stops the writing of a shard that has unreadable images, so that the shard does not appear."""


def write_shard(
    shard: Shard,
    *,
    class_names: tuple[str, ...],
    encode: Callable[[Sample], tuple[bytes, bool]],
    file_format: str,
    skip_bad: bool,
) -> dict[str, Any]:
    """Writes a shard. Its index and its part of the manifest appear first, so a shard that exists is complete.

    Returns its part of the manifest. A shard with unreadable images is not written unless `skip_bad`.
    """
    bad: list[tuple[str, str]] = []
    encoded_anew = 0

    def images() -> Iterator[Image]:
        nonlocal encoded_anew
        for number, sample in enumerate(shard.samples, shard.first):
            try:
                data, anew = encode(sample)
            except UnreadableImage as error:
                bad.append((sample.name, str(error)))
                continue
            if bad and not skip_bad:
                continue  # now it only matters what else is unreadable
            encoded_anew += anew
            label = sample.label + LABEL_BASE[file_format]
            yield Image(f"{number:08d}", data, label, class_names[sample.label].encode(errors="surrogateescape"))

    part: dict[str, Any] = {"images": 0, "bad": bad}
    with suppress(Unwritten), atomic_writer(shard.path) as file:
        summed = Summed(file)
        write, source = FORMATS[file_format]
        lines = write(summed, images())
        if bad and not skip_bad:
            raise Unwritten
        part = {
            "images": len(lines),
            "bytes": summed.size,
            "sha256": summed.sha256.hexdigest(),
            "encoded_anew": encoded_anew,
            "bad": bad,
            "source": digest(shard.samples),
        }
        with atomic_writer(index_path(shard.path)) as index_file:
            index_file.write(source.index_text(lines).encode())
        write_json(shard.path.parent / UNFINISHED / f"{shard.path.name}.json", part)
    return part


class Image(NamedTuple):
    """What is stored of a sample. key: its number in the split, by which WebDataset names it."""

    key: str
    encoded: bytes
    label: int
    text: bytes


class Summed:
    """Writes to a file, and keeps the size and the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


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


FORMATS: dict[str, tuple[Callable[[Any, Iterator[Image]], list[str]], type[ShardSource]]] = {
    "tfrecord": (write_tfrecords, Records),
    "webdataset": (write_webdataset, Tars),
}
