"""Writes one shard, in a worker: TFRecords or a tar, its index, its part of the manifest."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

from nvcnn.data import tars
from nvcnn.data.images import UnreadableImage
from nvcnn.data.manifest import UNFINISHED, write_json
from nvcnn.data.plan import LABEL_BASE, Sample, Shard, digest
from nvcnn.data.tfrecord import atomic_writer, encode_example, index_path, index_text, write_record


class Unwritten(Exception):
    """Ends a shard that has unreadable images, so that none appears."""


def write_shard(
    shard: Shard,
    *,
    class_names: tuple[str, ...],
    encode: Callable[[Sample], tuple[bytes, bool]],
    file_format: str,
    skip_bad: bool,
) -> dict[str, Any]:
    """A shard, in a worker: its index, its part of the manifest, then itself, so one that is there is complete.

    It is not written when images are unreadable and not to be skipped.
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
                continue  # only what else is unreadable is of interest now
            encoded_anew += anew
            label = sample.label + LABEL_BASE[file_format]
            yield Image(f"{number:08d}", data, label, class_names[sample.label].encode(errors="surrogateescape"))

    part: dict[str, Any] = {"images": 0, "bad": bad}
    with suppress(Unwritten), atomic_writer(shard.path) as file:
        summed = Summed(file)
        records, index = WRITERS[file_format](summed, images())
        if bad and not skip_bad:
            raise Unwritten
        part = {
            "images": records,
            "bytes": summed.size,
            "sha256": summed.sha256.hexdigest(),
            "encoded_anew": encoded_anew,
            "bad": bad,
            "source": digest(shard.samples),
        }
        with atomic_writer(index_path(shard.path)) as index_file:
            index_file.write(index.encode())
        write_json(shard.path.parent / UNFINISHED / f"{shard.path.name}.json", part)
    return part


class Image(NamedTuple):
    """What is stored of a sample; key: its number in the split, by which WebDataset names it."""

    key: str
    encoded: bytes
    label: int
    text: bytes


class Summed:
    """A file for writing that keeps the size and the SHA-256 of what it got."""

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
    """Of a record, as ImageNet's TFRecords name them; bounding boxes are unknown."""
    return {
        "image/encoded": [image.encoded],
        "image/class/label": [image.label],
        "image/class/text": [image.text],
        **{f"image/object/bbox/{side}": [] for side in ("xmin", "ymin", "xmax", "ymax")},
    }


def write_tfrecords(file: Any, images: Iterator[Image]) -> tuple[int, str]:
    """Returns the number of records and the index."""
    records, at = [], 0
    for image in images:
        size = write_record(file, encode_example(features(image)))
        records.append((at, size))
        at += size
    return len(records), index_text(records)


def write_webdataset(file: Any, images: Iterator[Image]) -> tuple[int, str]:
    """A tar of key.jpg (or .png) and key.cls, the zero-based label in digits; the index is that of DALI's wds2idx."""
    lines = []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for image in images:
            suffix = "png" if image.encoded.startswith(b"\x89PNG") else "jpg"
            components = []
            for extension, data in ((suffix, image.encoded), ("cls", str(image.label).encode())):
                member = tarfile.TarInfo(f"{image.key}.{extension}")
                member.size = len(data)
                components.append(f"{extension} {tar.offset + tarfile.BLOCKSIZE} {len(data)} {member.name}")
                tar.addfile(member, io.BytesIO(data))
            lines.append(" ".join(components))
    return len(lines), tars.index_text(lines)


WRITERS = {"tfrecord": write_tfrecords, "webdataset": write_webdataset}
