"""Small data sets, written by our own writer; each image has a label of its own, by which batches are recognised."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvcnn.data.dataset import Dataset, find_dataset
from nvcnn.data.tfrecord import encode_example, write_shard

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
