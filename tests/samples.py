"""Makes pictures and the files that hold them, by code of its own where that is possible."""

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from nvcnn.data.records import Records
from nvcnn.data.shard_source import atomic_writer, index_path
from nvcnn.data.tfrecord import encode_example, write_record

if TYPE_CHECKING:
    from PIL import Image

IMAGES = 61  # a prime: no number of ranks or batch size divides it


def file_of(image: "Image.Image", kind: str = "JPEG", orientation: int | None = None, **options) -> bytes:
    """Returns the image as a file. orientation: EXIF's, by which viewers turn it; options: of Pillow's writer."""
    if orientation is not None:
        options["exif"] = image.getexif()
        options["exif"][0x0112] = orientation
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def record(image: bytes, label: int) -> bytes:
    return encode_example({"image/encoded": [image], "image/class/label": [label]})


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mtime = len(data), 1_300_000_000
    tar.addfile(member, io.BytesIO(data))


def write_shard(path: Path, examples: Iterable[bytes]) -> None:
    """Writes a shard and its index; a shard that is there is complete. Skips the test where CRCs are missing."""
    pytest.importorskip("google_crc32c")
    lines, at = [], 0
    with atomic_writer(path) as file:
        for example in examples:
            size = write_record(file, example)
            lines.append(f"{at} {size}")
            at += size
        with atomic_writer(index_path(path)) as index:
            index.write(Records.index_text(lines).encode())


def picture(i: int, kind: str = "PNG", mode: str = "L", size: tuple[int, int] = (28, 28)) -> bytes:
    """Returns a smooth picture, so that JPEG keeps it nearly as it was."""
    import numpy as np
    from PIL import Image

    small = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return file_of(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode), kind)


def write_split(
    directory: Path,
    split: str,
    images: int = IMAGES,
    shards: int = 3,
    encoded: Callable[[int], bytes] = picture,
    label: Callable[[int], int] = lambda i: i + 1,
) -> list[Path]:
    """Writes TFRecords and their indexes. Returns the shards."""
    directory.mkdir(exist_ok=True)
    paths = [directory / f"{split}-{s:05d}-of-{shards:05d}" for s in range(shards)]
    for s, path in enumerate(paths):
        part = range(images * s // shards, images * (s + 1) // shards)
        write_shard(path, (record(encoded(i), label(i)) for i in part))
    return paths


def write_tars(
    directory: Path,
    split: str,
    images: int = IMAGES,
    shards: int = 3,
    encoded: Callable[[int], bytes] = picture,
    label: Callable[[int], object] = lambda i: i + 1,
    suffix: str = "png",
    name: str = "folder.x/{:06d}",
    others: Iterable[str] = ("json",),
    other: bytes = b"{}",
) -> list[Path]:
    """Writes WebDataset tars. Returns them. name: of image i. others: suffixes of members that nobody wants."""
    directory.mkdir(exist_ok=True)
    paths = [directory / f"{split}-{s:05d}.tar" for s in range(shards)]
    for s, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for i in range(images * s // shards, images * (s + 1) // shards):
                members = {suffix: encoded(i)} | dict.fromkeys(others, other) | {"cls": str(label(i)).encode()}
                for kind, data in members.items():
                    add(tar, f"{name.format(i)}.{kind}", data)
    return paths


def write_folders(
    directory: Path,
    split: str,
    images: int = IMAGES,
    encoded: Callable[[int], bytes] = picture,
    label: Callable[[int], int] = lambda i: i,
    suffix: str = "png",
    name: str = "n{1:05d}/image {0}",
) -> list[Path]:
    """Writes a folder for each label. Returns the images. name: of image i and its label, below the split's folder."""
    paths = [directory / split / f"{name.format(i, label(i))}.{suffix}" for i in range(images)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
    return paths


WRITERS = {"records": write_split, "tars": write_tars, "folders": write_folders}
