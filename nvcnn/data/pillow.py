"""Decodes images with Pillow."""

import io
import warnings
from typing import TYPE_CHECKING

from nvcnn.data.headers import ORIENTATION, jpeg_bits
from nvcnn.program import InputError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 178_956_970  # where Pillow sees a decompression bomb; more than a camera's, and 500 MB decoded
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
PNG_END = b"IEND\xae\x42\x60\x82"  # a PNG's last chunk with its CRC
SAMPLE_FORMAT = 0x0153  # TIFF's tag; 2 means signed integers, 3 floating-point numbers
REPLACE = ": replace it and make the data set again, or leave such images out with --skip_bad_images"
UPRIGHT = (
    *("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE"),
    *("ROTATE_270", "TRANSVERSE", "ROTATE_90"),
)


def require_pillow() -> None:
    try:
        import PIL.Image
    except ImportError:
        raise InputError("reading images needs Pillow: pip install pillow") from None
    warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # MAX_PIXELS decides


def decode(data: bytes) -> "Image.Image":
    """Returns the image as RGB, upright, its transparency dropped. Raises ValueError saying what is wrong."""
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
        image = of_8_bits(image)
    except Image.DecompressionBombError:
        raise ValueError(f"{size(data)} pixels are more than {MAX_PIXELS:,}") from None
    except UnidentifiedImageError:
        what = unknown(data) or "not a JPEG, PNG, BMP, WebP, TIFF, PPM or JPEG 2000 file"
        raise ValueError(f"it is {what}") from None
    except Exception as error:  # Pillow's parsers raise nearly anything on damaged files
        raise ValueError(next(iter(str(error).splitlines()), "") or type(error).__name__) from None
    orientation = orientation_of(image)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image.transpose(Image.Transpose[UPRIGHT[orientation - 2]]) if orientation in range(2, 9) else image


def of_8_bits(image: "Image.Image") -> "Image.Image":
    """Returns grey of 16 bits as grey of 8, which Pillow would clip at 255, and other images as they are.

    Raises ValueError for numbers of which nothing says what is white.
    """
    tiff = image.tag_v2 if image.format == "TIFF" else None  # type: ignore[attr-defined]
    if image.mode == "F" or (tiff and (image.mode == "I" or not {2, 3}.isdisjoint(tiff.get(SAMPLE_FORMAT, ())))):
        raise ValueError("its pixels are signed, 32-bit or floating-point numbers: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    return image


def unknown(data: bytes) -> str | None:
    """Returns what a file is that Pillow does not know, where that can be said."""
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "a TIFF that is cut short, or of a kind that Pillow does not know: save it with 8 bits"
    bits = jpeg_bits(data)
    return None if bits in (None, 8) else f"a JPEG of {bits} bits: save it with 8"


def size(data: bytes) -> str:
    """Returns "width x height" of an image of any size, or "its" where the decoder refuses it at once."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        return f"{image.width} x {image.height}"
    except Exception:  # a WebP that is cut short
        return "its"
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def orientation_of(image: "Image.Image") -> int:
    """Returns EXIF's orientation, 1 when there is none."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data: the image is shown as it is stored
        return 1


def undecodable(name: str, why: str) -> str:
    return f"{name}: the image cannot be decoded ({why})"
