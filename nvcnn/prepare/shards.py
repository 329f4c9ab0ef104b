"""Writes one shard in a worker: TFRecords or a tar, its index, its part of the manifest."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, BinaryIO

from nvcnn.data.dataset import UNFINISHED
from nvcnn.data.shard_source import atomic_writer, index_path
from nvcnn.prepare.blueprint import Sample, Shard, digest
from nvcnn.prepare.encode import UnreadableImage
from nvcnn.prepare.formats import FORMATS, Image
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
    encoded_anew, kind = 0, FORMATS[file_format]

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
            label = sample.label + kind.label_base
            yield Image(f"{number:08d}", data, label, class_names[sample.label].encode(errors="surrogateescape"))

    part: dict[str, Any] = {"images": 0, "bad": bad}
    with suppress(Unwritten), atomic_writer(shard.path) as file:
        summed = Summed(file)
        lines = kind.write(summed, images())
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
            index_file.write(kind.source.index_text(lines).encode())
        write_json(shard.path.parent / UNFINISHED / f"{shard.path.name}.json", part)
    return part


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
