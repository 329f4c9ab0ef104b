"""Makes small data sets in which each image has a label of its own, by which batches are recognised."""

import pytest

from nvcnn.data.dataset import Dataset
from tests.nvcnn.data.reading import find
from tests.samples import IMAGES, WRITERS


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    """Returns 61 grey 28 x 28 images, the same in each kind of files and each split; an image's number is its class."""
    found = {}
    for kind, write in WRITERS.items():
        directory = tmp_path_factory.mktemp(kind)
        for split in ("validation" if kind == "records" else "val", "train"):
            write(directory, split)
        for split in ("validation", "train"):  # which builds the indexes of tars
            found[kind] = find(directory, split, num_classes=IMAGES)
    return found


@pytest.fixture(scope="session")
def dataset(sources: dict[str, Dataset]) -> Dataset:
    """Returns those in TFRecords."""
    return sources["records"]
