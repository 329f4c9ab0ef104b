"""Small data sets, written by our own writer; each image has a label of its own, by which batches are recognised."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nvcnn.data.dataset import Dataset, find_dataset
from tests.samples import IMAGES, WRITERS, picture, write_split


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
