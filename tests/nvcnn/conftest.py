"""Makes a data directory small enough for a test."""

from pathlib import Path

import pytest

from nvcnn.prepare.fashion_mnist import png
from tests.samples import write_split


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a directory with 30 training images of 10 classes, in one shard."""
    directory = tmp_path_factory.mktemp("small")
    image = png(bytes(28 * 28), 28, 28)
    write_split(directory, "train", 30, 1, lambda i: image, lambda i: i % 10 + 1)
    return directory
