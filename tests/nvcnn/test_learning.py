"""Models learn 64 random images by heart: initialisation, gradients and update belong together."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nvcnn.data.batch import Batch
from nvcnn.distributed import Transport
from nvcnn.models import MODELS, build_model
from nvcnn.models.layers import BatchNorm2d, flatten
from nvcnn.optimizer.schedule import poly
from nvcnn.program import Launch
from nvcnn.step import Step

IMAGES, CLASSES, PATCHES = 64, 10, 4


class Case(NamedTuple):
    """rate: the share of its norm that a tensor moves by in the first step, without momentum."""

    steps: int
    rate: float = 0.02
    aux: bool = False


CASES = {
    "lenet": Case(30, 0.01),
    "alexnet": Case(220, 0.005),
    "overfeat": Case(150, 0.005),
    "vgg11": Case(200, 0.005),
    "vgg13": Case(300, 0.005),
    "vgg16": Case(600, 0.003),
    "vgg19": Case(1000, 0.003),
    "googlenet": Case(20, aux=True),
    "inception3": Case(35, 0.01),
    "inception4": Case(60, 0.005),
    "inception-resnet2": Case(15),
    "resnet18": Case(10),
    "resnet34": Case(12),
    "resnet50": Case(10),
    "resnet101": Case(20),
    "resnet152": Case(25, 0.01),
    "resnext50": Case(10),
    "resnext101": Case(12),
    "resnext152": Case(15),
}
QUICK = ("lenet", "resnet18")
LONG = ("overfeat", "vgg13", "vgg16", "vgg19")  # hundreds of steps, as they have no BatchNorm


def patched(size: int, device: torch.device) -> Batch:
    """Returns images of random patches, each channel black or white: poolings keep what tells them apart."""
    g = torch.Generator().manual_seed(1)
    patches = torch.randint(2, (IMAGES, PATCHES, PATCHES, 3), dtype=torch.uint8, generator=g) * 255
    at = torch.arange(size) * PATCHES // size
    labels, flip = torch.randint(CLASSES, (IMAGES,), generator=g), torch.zeros(IMAGES, dtype=torch.bool)
    return Batch(*(t.to(device) for t in (patches[:, at][:, :, at].contiguous(), labels, flip)))


def learn(name: str, case: Case, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """Trains the model on images of its smallest size. Returns it in evaluation mode, the images and their labels.

    Its BatchNorms take the batch's statistics still, as the running ones lag behind in so few steps. Dropout is on in
    training, and no longer.
    """
    size = MODELS[name].least_size or MODELS[name].image_size
    data = patched(size, device)
    step = Step(
        build_model(name, num_classes=CLASSES, seed=1, aux=case.aux),
        image_size=size,
        device=device,
        schedule=poly(case.rate, case.steps),
        transport=Transport(Launch()),
        larc_mode="scale",
        larc_eta=1.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for _ in range(case.steps):
            step(data)
    for module in step.model.eval().modules():
        if isinstance(module, BatchNorm2d):
            module.train()
    return step.model, step.prepare_input(data.images, data.flip), data.labels


def marked(name: str) -> Any:
    marks = [] if name in QUICK else [pytest.mark.full]
    if name in LONG:
        marks += [pytest.mark.skipif(not torch.cuda.is_available(), reason="hundreds of large steps: needs a GPU")]
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", [marked(name) for name in CASES])
def test_learns_random_images_by_heart(device, name):
    model, images, labels = learn(name, CASES[name], device)
    with torch.no_grad():
        assert F.cross_entropy(model(images), labels) < 0.01


@pytest.mark.full
def test_trivial_learns_what_passes_its_relu(device):
    """It has one hidden unit: images for which that is zero look alike, and no gradient changes that.

    So what is left of their loss is the entropy of their labels; the others are learnt.
    """
    model, images, labels = learn("trivial", Case(300, 0.05), device)
    with torch.no_grad():
        logits, seen = model(images), model.fc1(flatten(images)).flatten() > 0
    shares = labels[~seen].bincount(minlength=CLASSES) / (~seen).sum()
    left = F.cross_entropy(logits[~seen], labels[~seen]) - torch.special.entr(shares).sum()
    assert 5 < seen.sum() < IMAGES
    assert (logits.argmax(1) == labels)[seen].all()
    assert -1e-5 < left < 0.05
