"""Hits are counted by the book, also where logits are equal, not finite, or fewer than five."""

from pathlib import Path

import pytest
import torch
from torch import nn

from nvcnn.data.batch import Batch
from nvcnn.distributed import Transport
from nvcnn.evaluate import Evaluation, accuracy, check_classes, count_hits, lines, summed
from nvcnn.program import InputError, Launch


class Fixed(nn.Module):
    """Hands out the logits it was given, batch by batch."""

    def __init__(self, *logits):
        super().__init__()
        self.logits = list(logits)

    def forward(self, x):
        return self.logits.pop(0)


def count(device, logits, labels, batch=3):
    logits, labels = (torch.as_tensor(values, device=device).split(batch) for values in (logits, labels))
    sizes = [len(part) for part in labels]
    images = [torch.zeros(n, 4, 4, 3, dtype=torch.uint8, device=device) for n in sizes]
    flips = [torch.zeros(n, dtype=torch.bool, device=device) for n in sizes]
    data = [Batch(*parts) for parts in zip(images, labels, flips, strict=True)]
    return count_hits(Fixed(*logits), data, torch.float32, "signed").tolist()


def test_counts(device):
    logits = -torch.arange(10.0).expand(7, 10)  # class 0 is the likeliest, then 1, ...
    assert count(device, logits, torch.tensor([0, 1, 2, 3, 4, 5, 6])) == [7, 1, 5]
    assert count(device, logits, torch.tensor([0, 0, 0, 9, 9, 9, 4])) == [7, 3, 4]


def test_a_model_that_says_the_same_of_every_class_does_not_hit_them_all(device):
    images, top1, top5 = count(device, torch.zeros(10, 10), torch.arange(10))
    assert (images, top1, top5) == (10, 1, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_hit_nothing(device, value):
    logits = torch.eye(10)
    logits[range(4), range(4)] = value  # the label's: topk takes it for the largest
    assert count(device, logits, torch.arange(10)) == [10, 6, 6]


def test_fewer_than_five_classes(device):
    assert count(device, torch.eye(3), torch.tensor([0, 1, 0])) == [3, 2, 3]


def test_a_rank_without_images_counts_nothing():
    assert count_hits(Fixed(), [], torch.float32, "signed").tolist() == [0, 0, 0]


def test_lines():
    result = accuracy(torch.tensor([400, 300, 380]))
    assert result == {"top1": 75.0, "top5": 95.0, "images": 400}
    assert lines(result)[1] == "Validation Top-1: 75.000 % +/- 2.17"  # sqrt(75 x 25 / 400)
    assert lines(result)[2] == "Validation Top-5: 95.000 % +/- 1.09"
    assert summed(torch.tensor([400, 300, 380]), Transport(Launch())) == result


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "--log_dir"),
        ({"log_dir": "a", "checkpoint": "b"}, "one of --log_dir"),
        ({"log_dir": "a", "batch_size": 0}, "--batch_size=0"),
        ({"log_dir": "a", "model": "resnet51"}, "--model=resnet51"),
        ({"log_dir": "a", "report": ""}, "--report="),
        ({"log_dir": "a", "weights_from": "timm"}, "--weights_from=timm needs --checkpoint"),
    ],
)
def test_bad_flags(asked, message):
    with pytest.raises(InputError, match=message):
        Evaluation(data_dir="d", **asked)


def test_classes_of_other_numbers_are_refused():
    path = Path("checkpoint.pt")
    for here, there in ((["cat", "dog"], ["cat", "dog"]), (None, ["cat"]), (["cat"], [])):
        check_classes("data", here, path, there)
    with pytest.raises(InputError, match=r"--data_dir=data: its class 1 is 'dog', but in checkpoint.pt that is 'eel'"):
        check_classes("data", ["cat", "dog"], path, ["cat", "eel"])
    with pytest.raises(InputError, match=r"--data_dir=data: 2 classes, but checkpoint.pt has 3: give its data"):
        check_classes("data", ["cat", "dog"], path, ["cat", "dog", "eel"])
