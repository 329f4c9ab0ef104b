"""Images by Pillow: what a sample shows, and the crops of training and evaluation."""

import io
import math
import random
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nvcnn.program import InputError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 178_956_970  # where Pillow sees a decompression bomb; more than a camera's, and 500 MB decoded
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")  # what DALI decodes, too
CROP_ATTEMPTS = 10  # as torchvision and DALI
PNG_END = b"IEND\xae\x42\x60\x82"  # a PNG's last chunk with its CRC
ORIENTATION = 0x0112  # EXIF's tag; its values 2 .. 8 name the transposition that makes an image upright
REPLACE = ": replace it and make the data set again, or leave such images out with --skip_bad_images"
UPRIGHT = (
    *("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE"),
    *("ROTATE_270", "TRANSVERSE", "ROTATE_90"),
)


def require_pillow() -> None:
    try:
        import PIL.Image
    except ImportError:
        raise InputError("reading images needs Pillow: pip install nvcnn[images]") from None
    warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # MAX_PIXELS decides


def decode(data: bytes) -> "Image.Image":
    """The image as RGB, upright; transparency is dropped, not blended. Raises ValueError saying what is wrong."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ValueError("it has no bytes")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        if image.format == "PNG" and PNG_END not in data:  # Pillow does without, DALI does not
            raise ValueError("image file is truncated")
        if image.mode.startswith("I;16"):  # Pillow would clip at 255
            image = image.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    except Image.DecompressionBombError:
        width, height = size(data)
        raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS:,}") from None
    except UnidentifiedImageError:
        raise ValueError("it is no JPEG, PNG, BMP, WebP, TIFF, PPM or JPEG 2000 file") from None
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged files
        raise ValueError(next(iter(str(error).splitlines()), "") or type(error).__name__) from None
    orientation = orientation_of(image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image.transpose(Image.Transpose[UPRIGHT[orientation - 2]]) if orientation in range(2, 9) else image


def size(data: bytes) -> tuple[int, int]:
    """Width and height of an image of any size."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS).size
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def orientation_of(image: "Image.Image") -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data: the image is shown as it is stored
        return 1


def undecodable(name: str, why: str) -> str:
    return f"{name}: the image cannot be decoded ({why})"


def random_crop(
    width: int, height: int, area: tuple[float, float], aspect: tuple[float, float], generator: random.Random
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a crop: area uniform, aspect log-uniform, place uniform, in whole pixels.

    The rule of torchvision's RandomResizedCrop and of DALI: what does not fit is drawn again; in the end the largest
    crop of an allowed aspect is taken, at a random place as DALI has it (torchvision: in the middle).
    """
    logs = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(CROP_ATTEMPTS):
        target, ratio = width * height * generator.uniform(*area), math.exp(generator.uniform(*logs))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w, h = min(width, round(height * aspect[1])), min(height, round(width / aspect[0]))
        shrink = min(1.0, math.sqrt(area[1] * width * height / max(1, w * h)))
        w, h = max(1, int(w * shrink)), max(1, int(h * shrink))
    left, top = generator.randint(0, width - w), generator.randint(0, height - h)
    return left, top, left + w, top + h


def pixels(image: "Image.Image") -> Tensor:
    """(H, W, 3) uint8."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def middle(image: "Image.Image", image_size: int, crop: float) -> Tensor:
    """(image_size, image_size, 3) uint8: the middle `crop` of width and height, bilinear, with antialiasing.

    The cut is not rounded to whole pixels.
    """
    from PIL import Image

    margin = (1 - crop) / 2
    w, h = image.size
    box = (margin * w, margin * h, (1 - margin) * w, (1 - margin) * h)
    return pixels(image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box))
