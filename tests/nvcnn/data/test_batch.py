"""The network's input follows the formula in float64; synthetic batches are like real ones."""

import os
import subprocess
import sys

import pytest
import torch

from nvcnn.data.batch import prepare_input
from nvcnn.data.synthetic import SyntheticData
from nvcnn.program import InputError

EPSILON = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # relative error of one rounding
MEAN_DEVIATION = {"signed": [[0.5] * 3, [0.5] * 3], "imagenet": [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]}


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("normalize", MEAN_DEVIATION)
def test_is_mirrored_and_normalised(device, dtype, normalize):
    images = torch.randint(256, (4, 5, 7, 3), dtype=torch.uint8, device=device)
    flip = torch.tensor([True, False, False, True], device=device)
    how = {"dtype": dtype, "normalize": normalize, "channels": 4}
    x = prepare_input(images, flip, **how)
    assert (x.shape, x.dtype, x.stride()) == ((4, 4, 5, 7), dtype, (140, 1, 28, 4))
    assert not x[:, 3:].any()
    mean, deviation = torch.tensor(MEAN_DEVIATION[normalize], dtype=torch.float64)
    exact = torch.where(flip.cpu().view(4, 1, 1, 1), images.cpu().flip(2), images.cpu()).double() / 255
    exact = ((exact - mean) / deviation).permute(0, 3, 1, 2)
    # In fp32 scale, shift, product and sum are rounded, of terms up to 4.9; then once to dtype.
    bound = 3 * 2**-24 * (exact.abs() + 2 * 2.2) + EPSILON[dtype] * exact.abs()
    assert ((x[:, :3].cpu().double() - exact).abs() <= bound).all()
    into = torch.full_like(x, torch.nan)
    assert prepare_input(images, flip, into=into, **how) is into
    assert torch.equal(into, x)


def synthetic(device, **changes) -> SyntheticData:
    values = {"batch_size": 8, "image_size": 10, "num_classes": 5, "images": 100, "seed": 1, "device": device}
    return SyntheticData(**values | changes)


def test_synthetic_data_has_the_interface_of_training_data(device):
    data = synthetic(device)
    images, labels, flip = batch = next(data)
    assert images.shape == (8, 10, 10, 3)
    assert (images.dtype, labels.dtype, flip.dtype) == (torch.uint8, torch.int64, torch.bool)
    assert labels.shape == flip.shape == (8,)
    assert {t.device.type for t in batch} == {device.type}
    assert next(iter(data)).images is images  # made once
    assert (data.images, data.batches_per_epoch) == (100, 12)
    assert synthetic(device, ranks=3).batches_per_epoch == 4
    assert data.state_dict() == {}
    data.close()


def test_synthetic_data_follows_its_seed(device):
    wide = {"batch_size": 500, "images": 500}
    images, labels, flip = next(synthetic(device, **wide))
    assert labels.unique().tolist() == [0, 1, 2, 3, 4]
    assert images.unique().numel() == 256
    assert 0 < flip.sum() < 500
    assert torch.equal(images, next(synthetic(device, **wide)).images)
    assert not torch.equal(images, next(synthetic(device, seed=2, **wide)).images)


def test_synthetic_images_carry_their_class(device):
    images, labels, _ = next(synthetic(device, num_classes=1000, batch_size=100))
    assert labels.unique().numel() > 90
    rows = images[:, :, 0, 0].long() >> 7  # ten rows, ten bits
    assert torch.equal((rows << torch.arange(10, device=device)).sum(1), labels)
    assert torch.equal(images >> 7, (rows.byte()[:, :, None, None]).expand_as(images))
    assert (images & 127).unique().numel() == 128


def test_synthetic_data_smaller_than_a_batch(device):
    with pytest.raises(InputError, match="--batch_size=8: a total batch of 24 is more than the 20 images"):
        synthetic(device, images=20, ranks=3)


def test_importing_the_data_path_needs_torch_and_triton_alone():
    code = """
import sys
for name in ("nvidia", "google_crc32c", "numpy", "PIL", "tqdm"):
    sys.modules[name] = None
import torch
import nvcnn.data.backend
from nvcnn.data.batch import prepare_input
from nvcnn.data.synthetic import SyntheticData
data = SyntheticData(
    batch_size=2, image_size=4, num_classes=3, images=4, seed=1, device=torch.device("cpu")
)
batch = next(data)
print(prepare_input(batch.images, batch.flip, dtype=torch.float32, normalize="imagenet").shape)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # the interpreter needs numpy
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "[2, 3, 4, 4]" in result.stdout
