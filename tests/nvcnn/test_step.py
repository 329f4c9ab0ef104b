"""The training step: what it computes besides the update, and what it keeps where it is."""

import pytest
import torch

from nvcnn.data import Batch
from nvcnn.distributed import Launch, Transport
from nvcnn.kernel_choices import places, use
from nvcnn.models import build_model
from nvcnn.models.layers import BatchNorm2d, Classifier, Conv2d
from nvcnn.schedule import poly
from nvcnn.step import Step

SIZE, CLASSES = 8, 10


def tiny() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        *(Conv2d(3, 16, 3, bias=False), BatchNorm2d(16), torch.nn.ReLU()),
        *(torch.nn.Dropout(0.5), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), Classifier(16, CLASSES)),
    )


def resnet18() -> torch.nn.Module:
    return build_model("resnet18", num_classes=CLASSES, seed=1)


def make(device, build=tiny, size=SIZE, conv="torch", **options) -> Step:
    """LARC, and in fp16 a dynamic loss scale."""
    options = {"larc_eta": 0.003, "dtype": torch.float32, "transport": Transport(Launch())} | options
    options.setdefault("loss_scale", "dynamic" if options["dtype"] == torch.float16 else 1.0)
    model = build()
    use(model, dict.fromkeys(places(model, 4, size, options["dtype"]), conv))
    return Step(model, image_size=size, device=device, schedule=poly(0.1, 20), **options)


def batch(seed, device, size=SIZE, n=4) -> Batch:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, size, size, 3), dtype=torch.uint8, generator=g)
    labels, flip = torch.randint(CLASSES, (n,), generator=g), torch.randint(2, (n,), generator=g).bool()
    return Batch(*(t.to(device) for t in (images, labels, flip)))


def test_averages_are_debiased_and_pass_over_a_loss_that_is_not_finite(device):
    step = make(device)
    losses, weights = [], []
    for number in range(6):
        if number == 3:
            data = batch(number, device)
            latest = step(data._replace(labels=torch.full_like(data.labels, CLASSES)))  # no such class: NaN
            assert latest[0].isnan()
            assert torch.tensor(step.read()[3]).isnan()
            continue
        latest = step(batch(number, device))
        losses.append(latest.double())
        weights.append(0.1 * 0.9 ** torch.arange(len(losses) - 1, -1, -1, device=device, dtype=torch.float64))
        expected = weights[-1] @ torch.stack(losses) / weights[-1].sum()
        average, rest = step.read()[:3], step.read()[3:]
        assert average == pytest.approx(expected.tolist(), rel=1e-12)
        assert rest == [latest[0].item(), 1.0, len(losses)]


def test_state_goes_from_one_step_to_another(device):
    one, other = make(device), make(device)
    for number in range(3):
        one(batch(number, device))
    other.load_state_dict(one.state_dict())
    for step in (one, other):
        torch.manual_seed(5)
        step(batch(3, device))
    assert other.read() == one.read()
    assert torch.equal(one.arena.weight, other.arena.weight)
    assert other.broadcast() == 4
