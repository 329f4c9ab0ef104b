"""A data directory small enough to make for a test."""

from pathlib import Path

import pytest

from nvcnn.data.tfrecord import encode_example
from nvcnn.prepare.fashion_mnist import png
from tests.records import write_shard


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 training images of 10 classes, in one shard."""
    directory = tmp_path_factory.mktemp("small")
    image = png(bytes(28 * 28), 28, 28)
    records = (encode_example({"image/encoded": [image], "image/class/label": [i % 10 + 1]}) for i in range(30))
    write_shard(directory / "train-00000-of-00001", records)
    return directory
