"""DALI and Pillow show a picture alike: crops are as torchvision draws them, pixels as Pillow has them."""

import io
import random
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from nvcnn.data.class_folders import SUFFIXES
from nvcnn.data.crops import random_crop
from nvcnn.data.dataset import Dataset
from nvcnn.prepare.encode import Encoding, UnreadableImage, standard
from nvcnn.program import InputError
from tests.nvcnn.data.reading import BACKENDS, evaluation, find, joined, same, training
from tests.samples import file_of, write_split

ks_2samp = pytest.importorskip("scipy.stats").ks_2samp
transforms = pytest.importorskip("torchvision.transforms")

backends = pytest.mark.parametrize("backend", BACKENDS)
aspects = pytest.mark.parametrize("aspect", ["stretch", "keep"])


def data_of(directory, pictures: list[bytes], split: str = "train") -> Dataset:
    write_split(directory, split, images=len(pictures), shards=1, encoded=lambda i: pictures[i])
    return find(directory, split)


def shown(dataset, backend, image_size: int, **options) -> dict[int, np.ndarray]:
    """Returns what evaluation shows of each picture, by label."""
    batch = joined(list(evaluation(dataset, backend, image_size=image_size, **options)))
    return dict(zip(batch.labels.tolist(), batch.images.double().numpy(), strict=True))


def by_pillow(image: Image.Image, size: int, interpolation: str = "bilinear", **options) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling[interpolation.upper()], **options), float)


def middle_box(size: tuple[int, int], aspect: str, crop: float = 1.0) -> np.ndarray:
    """Returns left, top, right, bottom of what evaluation shows."""
    width, height = (min(size), min(size)) if aspect == "keep" else size
    margins = np.array([size[0] - crop * width, size[1] - crop * height]) / 2
    return np.concatenate((margins, size - margins))


def torchvision_crops(width: int, height: int, area, aspect, n: int) -> np.ndarray:
    """Returns area, as a share, and aspect of n crops by torchvision's rule."""
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    sizes = np.array([transforms.RandomResizedCrop.get_params(picture, area, aspect)[2:] for _ in range(n)], float)
    return np.stack((sizes[:, 0] * sizes[:, 1] / (width * height), sizes[:, 1] / sizes[:, 0]))


def assert_same_distribution(crops: np.ndarray, expected: np.ndarray) -> None:
    for what, a, b in zip(("area", "aspect"), crops, expected, strict=True):
        assert ks_2samp(a, b).pvalue > 0.01, what


@backends
def test_crops_are_distributed_as_torchvision_s(tmp_path, device, backend):
    """A picture whose red is x and green is y shows the crop's size: bilinear resizing keeps a ramp a ramp."""
    ramp = np.zeros((240, 240, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(240)[None, :], np.arange(240)[:, None]
    dataset = data_of(tmp_path, [file_of(Image.fromarray(ramp), "BMP")] * 16)
    how = {"image_size": 20, "crop_area": (0.2, 0.6), "crop_aspect": (0.5, 2.0), "device": device}
    source = training(dataset, backend, batch_size=8, **how)
    images = joined([next(source) for _ in range(150)]).images.double().cpu().numpy()
    x, y = images[:, 10, :, 0], images[:, :, 10, 1]
    slope = np.arange(20) - 9.5  # least squares over the row: better than its integers
    width, height = (20 * (line @ slope) / (slope @ slope) for line in (x, y))
    crops = np.stack((width * height / 240**2, width / height))
    assert_same_distribution(crops, torchvision_crops(240, 240, (0.2, 0.6), (0.5, 2.0), 2000))
    assert min(x[:, 0].std(), y[:, 0].std()) > 10  # they are everywhere


@pytest.mark.parametrize(
    ("area", "aspect", "size"),
    [
        ((0.1, 1.0), (0.8, 1.25), (60, 400)),
        ((0.1, 1.0), (0.8, 1.25), (500, 375)),
        ((0.08, 1.0), (0.75, 4 / 3), (400, 60)),
        ((0.08, 1.0), (0.75, 4 / 3), (7, 5)),
    ],
)
def test_pillow_s_crops_are_distributed_as_torchvision_s(area, aspect, size):
    """Some pictures have shapes on which ten attempts fail."""
    generator = random.Random(0)
    boxes = np.array([random_crop(*size, area, aspect, generator) for _ in range(3000)])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= size).all()
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    crops = np.stack((width * height / (size[0] * size[1]), width / height))
    assert_same_distribution(crops, torchvision_crops(*size, area, aspect, 3000))


def smooth(mode: str = "RGB", size: tuple[int, int] = (40, 30), values: tuple[int, int] = (0, 256)) -> Image.Image:
    small = np.random.default_rng(3).integers(*values, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)


@backends
@pytest.mark.parametrize(
    ("mode", "size", "crop", "image_size", "kind", "aspect", "interpolation"),
    [
        ("L", (28, 28), 0.875, 28, "PNG", "stretch", "bilinear"),
        ("RGB", (60, 45), 0.875, 13, "PNG", "stretch", "bilinear"),
        ("RGB", (60, 45), 1.0, 28, "JPEG", "stretch", "bilinear"),
        ("L", (28, 28), 0.5, 32, "JPEG", "stretch", "bilinear"),
        ("RGB", (60, 45), 0.875, 13, "PNG", "stretch", "bicubic"),
        *(
            ("RGB", size, crop, 24, "PNG", "keep", interpolation)
            for size in ((60, 45), (45, 60), (50, 50), (9, 7), (7, 9), (9, 1), (1, 9))
            for crop in (1.0, 0.875)
            for interpolation in ("bilinear", "bicubic")
        ),
    ],
)
def test_evaluation_shows_the_middle(tmp_path, mode, size, crop, image_size, kind, aspect, interpolation, backend):
    """It is Pillow's resize of that box, in floating point; DALI goes on with the edge's pixels beyond the edge."""
    values = (64, 192) if interpolation == "bicubic" else (0, 256)  # it overshoots; Pillow cuts that in each direction
    data = file_of(smooth(mode, size, values), kind)
    dataset = data_of(tmp_path, [data], "validation")
    how = {"crop": crop, "aspect": aspect, "interpolation": interpolation}
    (image,) = shown(dataset, backend, image_size, **how).values()
    edge = 0 if backend == "torch" else 10
    box = tuple(middle_box(size, aspect, crop) + edge)
    source = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32)
    padded = np.pad(source, ((edge, edge), (edge, edge), (0, 0)), "edge")
    for channel in range(3):
        exact = by_pillow(Image.fromarray(padded[..., channel]), image_size, interpolation, box=box)
        # Rounding, by Pillow of each direction; JPEG decoders may differ by a level. Bicubic weights, of both signs,
        # make Pillow's first rounding up to a quarter larger; DALI takes them from a table.
        rounding = {"torch": (0.5, 0.625), "dali_cpu": (0, 0.02)}[backend][interpolation == "bicubic"]
        allowed = (0.5001 if kind == "PNG" else 2.5001) + rounding
        assert np.abs(image[..., channel] - exact).max() <= allowed


@backends
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "pixels_off"), [((450, 300), 0), ((500, 375), 0.85), ((375, 500), 0.85), ((90, 60), 0)]
)
def test_keep_shows_what_torchvision_s_weights_were_evaluated_with(tmp_path, size, pixels_off, interpolation, backend):
    """torchvision resizes the image, whose longer side it rounds down to whole pixels, and cuts at whole pixels.

    Where both come out even, only roundings differ. Else its cut is half a pixel off, its scale less than a pixel in
    341, which is a third of one at the edge of 224: together less than 0.85 of the step from a pixel to the next.
    """
    image = smooth(size=size, values=(64, 192))
    resize = transforms.Resize(256, transforms.InterpolationMode(interpolation))
    expected = np.asarray(transforms.CenterCrop(224)(resize(image)), float)
    how = {"crop": 224 / 256, "aspect": "keep", "interpolation": interpolation}
    dataset = data_of(tmp_path, [file_of(image, "PNG")], "validation")
    (shows,) = shown(dataset, backend, 224, **how).values()
    step = max(np.abs(np.diff(expected, axis=axis)).max() for axis in (0, 1))
    assert np.abs(shows - expected).max() <= 1 + pixels_off * step


def turned(kind: str, **options) -> bytes:
    """Returns a picture whose orientation stands in XMP alone."""
    return file_of(smooth(), kind, xmp=b'<rdf:Description tiff:Orientation="6"/>', **options)


def png_text(keyword: str, text: str) -> bytes:
    texts = PngInfo()
    texts.add_itxt(keyword, text)
    return file_of(smooth(), "PNG", pnginfo=texts)


def grey_of(dtype: str, scale: float) -> bytes:
    """Returns a TIFF of the grey picture's values, times `scale`."""
    return file_of(Image.fromarray((np.asarray(smooth("L")) * scale).astype(dtype)), "TIFF")


def pnm(header: str, mode: str, scale: float = 1, text: bool = False) -> bytes:
    values = np.round(np.asarray(smooth(mode)) * scale).astype(np.uint8)
    return header.encode() + (" ".join(map(str, values.ravel())).encode() if text else values.tobytes())


SIXTEEN = np.asarray(smooth("L")).astype(np.uint16) * 257
EXIF_OF_A_LONG = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\4\0\0\0\1\0\0\0\6\0\0\0\0"
PICTURES = {
    "grey PNG": file_of(smooth("L"), "PNG"),
    "grey JPEG": file_of(smooth("L"), "JPEG", quality=95),
    "palette PNG": file_of(smooth().quantize(64), "PNG"),
    "RGBA PNG": file_of(smooth("RGBA"), "PNG"),
    "grey and alpha PNG": file_of(smooth("LA"), "PNG"),
    "CMYK JPEG": file_of(smooth("CMYK"), "JPEG", quality=95),
    **{kind: file_of(smooth(), kind) for kind in ("BMP", "TIFF", "PPM", "JPEG2000")},
    "WebP": file_of(smooth(), "WEBP", lossless=True),
    "16 bits": file_of(Image.fromarray(SIXTEEN), "PNG"),
    **{f"EXIF {n}": file_of(smooth(), "JPEG", orientation=n, quality=95) for n in range(1, 9)},
    # What DALI shows otherwise
    "XMP": turned("JPEG", quality=95),
    "XMP behind EXIF without orientation": turned("JPEG", quality=95, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
    "XMP in WebP": turned("WEBP", lossless=True),
    "XMP in PNG": png_text("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>'),
    "EXIF in PNG's text": png_text("Raw profile type exif", f"\nexif\n{len(EXIF_OF_A_LONG)}\n{EXIF_OF_A_LONG.hex()}\n"),
    "EXIF of a 32-bit number": file_of(smooth(), "JPEG", quality=95, exif=EXIF_OF_A_LONG),
    "CMYK JPEG without Adobe's marker": file_of(smooth("CMYK"), "JPEG", quality=95).replace(b"Adobe", b"adobe"),
    "an animation beside the image": file_of(
        smooth("L").convert("RGB"), "PNG", save_all=True, append_images=[smooth()] * 2, default_image=True
    ),
    "TIFF of 16 bits, big-endian": file_of(Image.frombytes("I;16B", (40, 30), SIXTEEN.astype(">u2").tobytes()), "TIFF"),
    "grey and alpha TIFF": file_of(smooth("LA"), "TIFF"),
    "black and white TIFF": file_of(smooth("1"), "TIFF"),
    "PGM up to 100": pnm("P5 40 30 100\n", "L", 100 / 255),
    "PPM in words": pnm("P3 40 30 255\n", "RGB", text=True),
    "BMP of 15 bits": struct.pack("<2s4I2i2H6I", b"BM", 2454, 0, 54, 40, 40, -30, 1, 16, 0, 2400, 0, 0, 0, 0)
    + (np.asarray(smooth("L")) // 8 * np.uint16(0b10000100001)).astype("<u2").tobytes(),
}


def as_pillow(name: str) -> Image.Image:
    if "16 bits" in name:  # Pillow's convert would clip
        return smooth("RGB").convert("L").convert("RGB")
    return ImageOps.exif_transpose(Image.open(io.BytesIO(PICTURES[name]))).convert("RGB")


@backends
@aspects
def test_every_kind_of_picture_is_as_pillow_shows_it(tmp_path, aspect, backend):
    images = shown(data_of(tmp_path, list(PICTURES.values()), "validation"), backend, 24, aspect=aspect)
    for name, (_, image) in zip(PICTURES, sorted(images.items()), strict=True):
        upright = as_pillow(name)
        expected = by_pillow(upright, 24, box=tuple(middle_box(upright.size, aspect)))
        assert np.abs(image - expected).mean() < 1.5, name


@backends
def test_training_shows_the_same_pictures_and_goes_on_with_the_same_crops(tmp_path, backend):
    """An image of 40 001 x 2 pixels is one more: DALI's random crop of it is beyond its edge, or ends the process."""
    long = file_of(Image.new("L", (2, 40_001), 77), "PNG")
    dataset = data_of(tmp_path, [*PICTURES.values(), long])
    how = {"batch_size": len(PICTURES) + 1, "image_size": 24}
    whole = next(training(dataset, backend, crop_area=(1.0, 1.0), crop_aspect=(4 / 3, 4 / 3), **how))
    for image, label in zip(whole.images.double().numpy(), whole.labels.tolist(), strict=True):
        name = [*PICTURES, "long"][label]
        upright = Image.new("RGB", (40, 30), (77,) * 3) if name == "long" else as_pillow(name)
        if upright.size == (40, 30):  # it has the crop's aspect
            assert np.abs(image - by_pillow(upright, 24)).mean() < 1.5, name
    data = training(dataset, backend, **how)
    next(data)
    resumed = training(dataset, backend, state=data.state_dict(), **how)
    assert same(next(data), next(resumed))


def message(dataset: Dataset, backend: str) -> str | None:
    try:
        next(training(dataset, backend, batch_size=1))
    except InputError as error:  # nothing may hold it: its frames hold the workers
        return str(error)


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (grey_of("f4", 1 / 255), "signed, 32-bit or floating-point numbers"),
        (grey_of("f4", 1), "signed, 32-bit or floating-point numbers"),
        (grey_of("i4", 1), "signed, 32-bit or floating-point numbers"),
        (b"Pf\n2 2\n-1.0\n" + bytes(16), "signed, 32-bit or floating-point numbers"),
        (file_of(smooth(), "JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"), "it is a JPEG of 12 bits"),
    ],
)
def test_what_is_refused_is_refused_alike(tmp_path, image, why):
    dataset = data_of(tmp_path, [image])
    one, other = (message(dataset, backend) for backend in BACKENDS)
    assert one == other
    assert re.search(f"the record at byte 0: the image cannot be decoded .*{why}", one)
    with pytest.raises(UnreadableImage, match=why.removeprefix("it ")):
        standard(image, Encoding())


@pytest.mark.parametrize("name", PICTURES)
def test_prepare_shows_the_same_pictures(name):
    """A file that is copied is shown by the rule above; one that is encoded anew shows the same."""
    data, anew = standard(PICTURES[name], Encoding())
    if anew:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        expected = as_pillow(name)
        assert image.size == expected.size
        assert np.abs(np.asarray(image, float) - np.asarray(expected, float)).mean() < 3.5
    else:
        assert data == PICTURES[name]


@backends
def test_every_suffix_in_class_folders(tmp_path, backend):
    for i, suffix in enumerate(SUFFIXES):
        folder = tmp_path / "val" / f"{i:02d}"
        folder.mkdir(parents=True)
        smooth("L").save(folder / f"picture{suffix}")
    images = shown(find(tmp_path, "validation"), backend, 24)
    assert len(images) == len(SUFFIXES)
    for label, image in images.items():
        assert np.abs(image - by_pillow(smooth("L"), 24)[..., None]).mean() < 3, SUFFIXES[label]


@backends
@aspects
def test_mixed_sizes_in_one_batch(tmp_path, aspect, backend):
    sizes = [(1, 1), (2, 900), (900, 2), (33, 57), (640, 480)]
    dataset = data_of(tmp_path, [file_of(smooth(size=size), "PNG") for size in sizes], "validation")
    for label, image in shown(dataset, backend, 16, aspect=aspect).items():
        expected = by_pillow(smooth(size=sizes[label]), 16, box=tuple(middle_box(sizes[label], aspect)))
        assert np.abs(image - expected).mean() < 1.0, sizes[label]
