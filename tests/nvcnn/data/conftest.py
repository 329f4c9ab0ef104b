"""Small data sets, written by our own writer; each image has a label of its own, by which batches are recognised."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvcnn.data.dataset import Dataset, find_dataset
from nvcnn.data.tfrecord import encode_example
from tests.records import write_shard

IMAGES = 61  # a prime: no number of ranks or batch size divides it


def picture(i: int, kind: str = "PNG", mode: str = "L", size: tuple[int, int] = (28, 28)) -> bytes:
    """A smooth picture, so that JPEG keeps it nearly as it was."""
    small = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode).save(data, kind)
    return data.getvalue()


def write_split(
    directory: Path,
    split: str,
    images: int = IMAGES,
    shards: int = 3,
    encoded: Callable[[int], bytes] = picture,
    label: Callable[[int], int] = lambda i: i + 1,
) -> list[Path]:
    directory.mkdir(exist_ok=True)
    paths = [directory / f"{split}-{s:05d}-of-{shards:05d}" for s in range(shards)]
    for s, path in enumerate(paths):
        part = range(images * s // shards, images * (s + 1) // shards)
        write_shard(
            path,
            (encode_example({"image/encoded": [encoded(i)], "image/class/label": [label(i)]}) for i in part),
        )
    return paths


def write_tars(
    directory: Path,
    split: str,
    images: int = IMAGES,
    shards: int = 3,
    encoded: Callable[[int], bytes] = picture,
    label: Callable[[int], object] = lambda i: i + 1,
    suffix: str = "png",
) -> list[Path]:
    """WebDataset tars with a member more than is wanted in each sample."""
    directory.mkdir(exist_ok=True)
    paths = [directory / f"{split}-{s:05d}.tar" for s in range(shards)]
    for s, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for i in range(images * s // shards, images * (s + 1) // shards):
                for kind, data in ((suffix, encoded(i)), ("json", b"{}"), ("cls", str(label(i)).encode())):
                    member = tarfile.TarInfo(f"folder.x/{i:06d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return paths


def write_folders(
    directory: Path,
    split: str,
    images: int = IMAGES,
    encoded: Callable[[int], bytes] = picture,
    label: Callable[[int], int] = lambda i: i,
    suffix: str = "png",
) -> list[Path]:
    """A folder for each label."""
    paths = [directory / split / f"n{label(i):05d}" / f"image {i}.{suffix}" for i in range(images)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
    return paths


WRITERS = {"records": write_split, "tars": write_tars, "folders": write_folders}


@pytest.fixture(scope="session")
def write_kind() -> Callable[..., list[Path]]:
    return lambda kind, *arguments, **options: WRITERS[kind](*arguments, **options)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    """The same 61 grey 28 x 28 images in each kind of files; an image's number is its class."""
    found = {}
    for kind, write in WRITERS.items():
        directory = tmp_path_factory.mktemp(kind)
        write(directory, "train")
        write(directory, "val" if kind != "records" else "validation")
        for split in ("validation", "train"):
            found[kind] = find_dataset(directory, num_classes=IMAGES, label_base=None, split=split)
    return found


@pytest.fixture(scope="session")
def write() -> Callable[..., list[Path]]:
    return write_split


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    return picture


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """61 grey 28 x 28 images in each split, labels 1 to 61."""
    directory = tmp_path_factory.mktemp("data")
    for split in ("train", "validation"):
        write_split(directory, split)
    find_dataset(directory, num_classes=IMAGES, label_base=None, split="validation")
    return find_dataset(directory, num_classes=IMAGES, label_base=None, split="train")
