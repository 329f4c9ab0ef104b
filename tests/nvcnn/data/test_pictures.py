"""What is shown of a picture, by DALI and by Pillow: crops as torchvision draws them, pixels as Pillow has them."""

import io
import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from nvcnn.data.backend import open_evaluation, open_training
from nvcnn.data.class_folders import SUFFIXES
from nvcnn.data.crops import random_crop
from nvcnn.data.dataset import find_dataset
from tests.samples import file_of

ks_2samp = pytest.importorskip("scipy.stats").ks_2samp
RandomResizedCrop = pytest.importorskip("torchvision.transforms").RandomResizedCrop

CPU = torch.device("cpu")
backends = pytest.mark.parametrize("backend", ["dali_cpu", "torch"])


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    return file_of(image, kind, **options)


def data_of(write, directory, pictures: list[bytes], split: str = "train"):
    write(directory, split, images=len(pictures), shards=1, encoded=lambda i: pictures[i])
    return find_dataset(directory, num_classes=len(pictures), label_base=None, split=split)


def training(dataset, backend, **changes):
    values = {"batch_size": 8, "image_size": 20, "crop_area": (0.2, 0.6), "crop_aspect": (0.5, 2.0), "seed": 1}
    return open_training(dataset, backend, **values | {"rank": 0, "ranks": 1, "device": CPU, "threads": 1} | changes)


def shown(dataset, backend, image_size: int) -> dict[int, np.ndarray]:
    """The whole of each picture, by label."""
    source = open_evaluation(
        dataset, backend, batch_size=4, image_size=image_size, crop=1.0, rank=0, ranks=1, device=CPU, threads=1
    )
    return {
        int(label): image.numpy().astype(float)
        for batch in source
        for image, label in zip(batch.images, batch.labels, strict=True)
    }


def torchvision_crops(width: int, height: int, area, aspect, n: int) -> np.ndarray:
    """Area, as a share, and aspect of n crops by torchvision's rule."""
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    sizes = np.array([RandomResizedCrop.get_params(picture, area, aspect)[2:] for _ in range(n)], float)
    return np.stack((sizes[:, 0] * sizes[:, 1] / (width * height), sizes[:, 1] / sizes[:, 0]))


def assert_same_distribution(crops: np.ndarray, expected: np.ndarray) -> None:
    for what, a, b in zip(("area", "aspect"), crops, expected, strict=True):
        assert ks_2samp(a, b).pvalue > 0.01, what


@backends
def test_crops_are_distributed_as_torchvision_s(tmp_path, write, backend):
    """A picture whose red is x and green is y shows the crop's size: bilinear resizing keeps a ramp a ramp."""
    ramp = np.zeros((240, 240, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(240)[None, :], np.arange(240)[:, None]
    dataset = data_of(write, tmp_path, [encoded(Image.fromarray(ramp))] * 16)
    batches = itertools.islice(training(dataset, backend), 150)
    images = torch.cat([batch.images for batch in batches]).double().numpy()
    x, y = images[:, 10, :, 0], images[:, :, 10, 1]
    slope = np.arange(20) - 9.5  # least squares over the row: better than its integers
    width, height = (20 * (line @ slope) / (slope @ slope) for line in (x, y))
    crops = np.stack((width * height / 240**2, width / height))
    assert_same_distribution(crops, torchvision_crops(240, 240, (0.2, 0.6), (0.5, 2.0), 2000))


@pytest.mark.parametrize("size", [(500, 375), (60, 400), (400, 60), (7, 5)])
@pytest.mark.parametrize(("area", "aspect"), [((0.1, 1.0), (0.8, 1.25)), ((0.08, 1.0), (0.75, 4 / 3))])
def test_pillow_s_crops_are_distributed_as_torchvision_s(size, area, aspect):
    """Of shapes on which ten attempts fail, too."""
    generator = random.Random(0)
    boxes = np.array([random_crop(*size, area, aspect, generator) for _ in range(3000)])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= size).all()
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    crops = np.stack((width * height / (size[0] * size[1]), width / height))
    assert_same_distribution(crops, torchvision_crops(*size, area, aspect, 3000))


@backends
@pytest.mark.parametrize("sizes", [(200, 64), (64, 64), (48, 64)], ids=["smaller", "same", "larger"])
def test_resizes_as_pillow_does_with_antialiasing(tmp_path, write, backend, sizes):
    """Noise, the worst case: within a level of Pillow on average; the same where nothing changes."""
    size, image_size = sizes
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))
    dataset = data_of(write, tmp_path, [encoded(noise)] * 8)
    batch = next(training(dataset, backend, image_size=image_size, crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0)))
    expected = np.asarray(noise.resize((image_size, image_size), Image.Resampling.BILINEAR), float)
    for image in batch.images.double().numpy():
        difference = np.abs(image - expected)
        assert difference.mean() < (1.0 if size != image_size else 1e-9)


def smooth(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    small = np.random.default_rng(3).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(smooth(), "JPEG", quality=95, exif=exif.tobytes())


PICTURES = {
    "grey PNG": encoded(smooth("L")),
    "grey JPEG": encoded(smooth("L"), "JPEG", quality=95),
    "palette PNG": encoded(smooth().quantize(64)),
    "RGBA PNG": encoded(smooth("RGBA")),
    "grey and alpha PNG": encoded(smooth("LA")),
    "CMYK JPEG": encoded(smooth("CMYK"), "JPEG", quality=95),
    **{kind: encoded(smooth(), kind) for kind in ("BMP", "TIFF", "PPM", "JPEG2000")},
    "WebP": encoded(smooth(), "WEBP", lossless=True),
    "16 bits": encoded(Image.fromarray(np.asarray(smooth("L")).astype(np.uint16) * 257)),
    **{f"EXIF {orientation}": rotated(orientation) for orientation in range(1, 9)},
}


@backends
def test_every_kind_of_picture_is_as_pillow_shows_it(tmp_path, write, backend):
    dataset = data_of(write, tmp_path, list(PICTURES.values()), "validation")
    images = shown(dataset, backend, 24)
    assert len(images) == len(PICTURES)
    for label, (name, data) in enumerate(PICTURES.items()):
        opened = smooth("L") if name == "16 bits" else Image.open(io.BytesIO(data))  # Pillow's convert would clip
        upright = ImageOps.exif_transpose(opened).convert("RGB")
        expected = np.asarray(upright.resize((24, 24), Image.Resampling.BILINEAR), float)
        assert np.abs(images[label] - expected).mean() < 1.5, name


@backends
def test_every_suffix_in_class_folders(tmp_path, backend):
    for i, suffix in enumerate(SUFFIXES):
        folder = tmp_path / "val" / f"{i:02d}"
        folder.mkdir(parents=True)
        smooth("L").save(folder / f"picture{suffix}")
    dataset = find_dataset(tmp_path, num_classes=None, label_base=None, split="validation")
    expected = np.asarray(smooth("L").resize((24, 24), Image.Resampling.BILINEAR), float)[..., None]
    images = shown(dataset, backend, 24)
    assert len(images) == len(SUFFIXES)
    for label, image in images.items():
        assert np.abs(image - expected).mean() < 3, SUFFIXES[label]


@backends
def test_mixed_sizes_in_one_batch(tmp_path, write, backend):
    sizes = [(1, 1), (2, 900), (900, 2), (33, 57), (640, 480)]
    dataset = data_of(write, tmp_path, [encoded(smooth(size=size)) for size in sizes], "validation")
    for label, image in shown(dataset, backend, 16).items():
        expected = np.asarray(smooth(size=sizes[label]).resize((16, 16), Image.Resampling.BILINEAR), float)
        assert np.abs(image - expected).mean() < 1.0, sizes[label]
