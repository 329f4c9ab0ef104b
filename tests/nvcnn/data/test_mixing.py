"""Batches are mixed as torchvision and timm mix them, by numbers that follow from seed, rank and batch alone."""

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import benchmarks.peers  # noqa: F401 (makes torchvision importable)
from nvcnn.data.batch import Batch, prepare_input
from nvcnn.data.mixing import Mixing

CLASSES = 7


@pytest.mark.parametrize("kind", ["MixUp", "CutMix"])
def test_is_torchvision_s(device, kind):
    """Of a batch of two, which torchvision's roll and timm's reverse order pair alike; each mirrored on its own."""
    from torchvision.transforms import v2

    images = torch.randint(256, (2, 12, 20, 3), dtype=torch.uint8, device=device)
    labels, flip = torch.tensor([2, 5], device=device), torch.tensor([True, False], device=device)
    mixing = Mixing(mixup=kind == "MixUp", cutmix=kind == "CutMix", seed=1, rank=0)
    data = mixing(Batch(images, labels, flip), 4)
    share, _, top, bottom, left, right = data.mix.tolist()
    params = {"box": tuple(map(int, (left, top, right, bottom))), "lam_adjusted": share, "lam": share}
    how = {"dtype": torch.float32, "normalize": "imagenet"}
    transform = getattr(v2, kind)(num_classes=CLASSES)
    with mock.patch.object(transform, "make_params", return_value=params):
        x, targets = transform(prepare_input(images, flip, **how), labels)
    torch.testing.assert_close(prepare_input(images, flip, data.mix, **how), x, rtol=1e-5, atol=1e-5)
    own = F.one_hot(labels, CLASSES)
    torch.testing.assert_close(share * own + (1 - share) * own.flip(0), targets)
    assert 0 < share < 1


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_are_of_the_beta_distribution(alpha):
    shares = torch.tensor([Mixing(alpha, 0, 1, 0).draw(i, 9, 9)[0] for i in range(4000)], dtype=torch.float64)
    variance = 1 / (4 * (2 * alpha + 1))
    assert shares.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(variance / 4000))
    assert shares.var().item() == pytest.approx(variance, rel=0.1)


def test_a_box_has_the_share_that_its_label_has_not():
    areas = []
    for i in range(2000):
        share, weight, top, bottom, left, right = Mixing(0, 1.0, 1, 0).draw(i, 10, 30)
        assert 0 <= top <= bottom <= 10
        assert 0 <= left <= right <= 30
        assert weight == 1
        assert share == 1 - (bottom - top) * (right - left) / 300
        areas.append((top, bottom, left, right))
    ends = [set(values) for values in zip(*areas, strict=True)]
    assert [min(ends[0]), max(ends[1]), min(ends[2]), max(ends[3])] == [0, 10, 0, 30]


def test_either_is_as_likely():
    draws = [Mixing(0.2, 1.0, 1, 0).draw(i, 16, 16) for i in range(2000)]
    assert sum(weight == 1 for _, weight, *_ in draws) == pytest.approx(1000, abs=5 * math.sqrt(500))


def test_follows_from_seed_rank_and_number():
    def draws(seed=1, rank=0, first=0):
        return [Mixing(0.2, 1.0, seed, rank).draw(first + i, 16, 16) for i in range(8)]

    assert draws() == draws()
    assert draws(first=3)[:5] == draws()[3:]
    assert all(draws(**other) != draws() for other in ({"seed": 2}, {"rank": 1}, {"first": 1}))
