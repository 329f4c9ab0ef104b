"""Opens readers with options that suit most tests, and takes batches from them."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from nvcnn.data.backend import open_evaluation, open_training
from nvcnn.data.batch import Batch
from nvcnn.data.dataset import Dataset, find_dataset

CPU = torch.device("cpu")
BACKENDS = ("dali_cpu", "torch")
ALONE = {"rank": 0, "ranks": 1, "device": CPU, "threads": 1}
TRAINING = {"batch_size": 4, "image_size": 16, "crop_area": (0.3, 1.0), "crop_aspect": (0.8, 1.25), "seed": 1}
EVALUATION = {"batch_size": 7, "image_size": 28, "crop": 1.0, "aspect": "stretch", "interpolation": "bilinear"}
WHOLE: dict[str, Any] = {"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0)}


def training(dataset: Dataset, backend: str = "dali_cpu", **changes):
    if backend == "dali_cpu":
        pytest.importorskip("nvidia.dali")
    return open_training(dataset, backend, **ALONE | TRAINING | changes)


def evaluation(dataset: Dataset, backend: str = "dali_cpu", **changes):
    if backend == "dali_cpu":
        pytest.importorskip("nvidia.dali")
    return open_evaluation(dataset, backend, **ALONE | EVALUATION | changes)


def find(directory: Path, split: str = "train", **flags) -> Dataset:
    return find_dataset(directory, **{"num_classes": None, "label_base": None} | flags, split=split)


def epoch(data) -> list[Batch]:
    return list(itertools.islice(data, data.batches_per_epoch))


def joined(batches: list[Batch]) -> Batch:
    return Batch(*map(torch.cat, zip(*batches, strict=True)))


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
