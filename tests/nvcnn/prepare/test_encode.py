"""Some image files are copied, some become JPEGs that are near to the original, some are refused."""

import numpy as np
import pytest
from PIL import Image

from nvcnn.prepare.encode import Encoding, UnreadableImage, png, standard
from tests.nvcnn.prepare.preparing import opened
from tests.raw_imagenet import photograph
from tests.samples import file_of

PHOTOGRAPH = photograph(3, 2).resize((97, 61))


def encoded(form: str, mode: str = "RGB", **options) -> bytes:
    return file_of(PHOTOGRAPH.convert(mode), form, **options)


def distance(data: bytes, expected: Image.Image) -> float:
    """Returns the mean difference in levels of 255."""
    image = opened(data)
    assert (image.format, image.size) == ("JPEG", expected.size)
    one, other = (np.asarray(i.convert("RGB"), dtype=np.int16) for i in (image, expected))
    return abs(one - other).mean()


@pytest.mark.parametrize("check", ["structure", "decode"])
@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("MPO", "RGB", {"save_all": True, "append_images": [PHOTOGRAPH]}),
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
    ],
)
def test_copied(form, mode, options, check):
    data = encoded(form, mode, **options)
    assert standard(data, Encoding(check=check)) == (data, False)
    assert standard(data + b"what a camera adds", Encoding(check=check))[1] is False


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        *(("JPEG", "CMYK"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "1"), ("GIF", "P"), ("BMP", "RGB")),
        *(("PPM", "RGB"), ("TIFF", "RGB"), ("TIFF", "CMYK"), ("WEBP", "RGB"), ("JPEG2000", "RGB")),
    ],
)
def test_encoded_anew(form, mode):
    data = encoded(form, mode)
    result, anew = standard(data, Encoding())
    assert anew
    assert opened(result).mode == ("L" if mode in ("LA", "1") else "RGB")
    assert distance(result, opened(data).convert("RGB")) < (9 if mode == "1" else 3)


def test_a_palette_with_transparency():
    image = PHOTOGRAPH.quantize(8)
    data = file_of(image, kind="PNG", transparency=bytes([0, 128] * 4))
    assert distance(standard(data, Encoding())[0], image.convert("RGB")) < 3


def test_sixteen_bits_are_scaled_not_clipped():
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    result, anew = standard(file_of(Image.fromarray(levels.astype(np.uint16)), "PNG"), Encoding())
    assert anew
    assert abs(np.asarray(opened(result), dtype=float) - levels / 257).mean() < 1


def test_imagenet_keeps_no_png():
    data = encoded("PNG")
    result, anew = standard(data, Encoding(keep=("JPEG",)))
    assert anew
    assert distance(result, PHOTOGRAPH) < 3


def test_what_is_encoded_anew_stands_upright():
    data = file_of(PHOTOGRAPH.transpose(Image.Transpose.ROTATE_90).convert("CMYK"), orientation=6)
    assert distance(standard(data, Encoding())[0], PHOTOGRAPH) < 4


@pytest.mark.parametrize(("form", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P")])
def test_max_side_is_the_longer_one(form, mode):
    big = photograph(5, 3).resize((1000, 611), Image.Resampling.BICUBIC)
    data = file_of(big.convert(mode), form)
    assert standard(data, Encoding(max_side=1000))[1] == (mode != "RGB")
    result, anew = standard(data, Encoding(max_side=200))
    assert anew
    expected = opened(data).convert("RGB").resize((200, 122), Image.Resampling.LANCZOS)
    assert distance(result, expected) < 2


def test_quality_decides_the_size():
    data = file_of(PHOTOGRAPH.resize((500, 400)), "BMP")
    assert len(standard(data, Encoding(quality=30))[0]) < len(standard(data, Encoding())[0]) / 2


def with_thumbnail(data: bytes) -> bytes:
    """Returns a JPEG with another, whole one in its EXIF block, as cameras write them."""
    block = b"Exif\0\0" + encoded("JPEG")
    return data[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + data[2:]


JPEG_FILE, PNG_FILE = encoded("JPEG"), encoded("PNG")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (b"<html>404</html>", "is not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),  # would start Ghostscript
        (JPEG_FILE[:3], "is not an image"),
        (JPEG_FILE[: len(JPEG_FILE) // 2], "(?i)truncated"),
        (JPEG_FILE[:-9], "truncated"),
        (with_thumbnail(JPEG_FILE)[:-9], "truncated"),
        (PNG_FILE[: len(PNG_FILE) // 2], "."),
        (PNG_FILE[:200] + b"\0" + PNG_FILE[201:], "."),
        (png(b"", 30_000, 30_000), "decompression bomb"),
    ],
)
def test_refused(data, why):
    with pytest.raises(UnreadableImage, match=why) as error:
        standard(data, Encoding())
    assert "\n" not in str(error.value)
    assert "0x" not in str(error.value)  # the same words in each run: they are in the manifest


def test_damage_in_the_middle_of_a_jpeg_is_not_found():
    """This is the price of not decoding, as documented: a file that begins and ends as it should is taken."""
    middle = len(JPEG_FILE) // 2
    holed = JPEG_FILE[:middle] + bytes(200) + JPEG_FILE[middle + 200 :]
    assert standard(holed, Encoding()) == (holed, False)
