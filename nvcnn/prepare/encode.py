"""Makes the image files of a data set: what is copied byte for byte, what becomes a JPEG, what is refused."""

import io
import struct
import zlib
from dataclasses import dataclass

from nvcnn.data import class_folders, pillow

FORMATS = (*pillow.FORMATS, "GIF")  # more than training reads: DALI has no GIF, but it becomes a JPEG
SUFFIXES = (*class_folders.SUFFIXES, ".gif")
END_OF_IMAGE = b"\xff\xd9"
JPEG_SIDE = 65_500  # libjpeg's limit


class UnreadableImage(Exception):
    """An image file that cannot be trained on. The message says why, and fits behind the file's name."""


@dataclass(frozen=True)
class Encoding:
    """Says what happens to the image files of a data set.

    keep: formats copied byte for byte, where the pixels are 8-bit grey or RGB.
    max_side: the longer side's most pixels; larger images are made smaller. None: as they are.
    quality: of a JPEG that is written, 1 to 95 by libjpeg's scale.
    check: of a copied file, "structure" or, much slower, "decode".
    """

    keep: tuple[str, ...] = ("JPEG", "PNG")
    max_side: int | None = None
    quality: int = 95
    check: str = "structure"


def standard(data: bytes, encoding: Encoding) -> tuple[bytes, bool]:
    """Returns the file to store, and whether it was encoded anew. Raises UnreadableImage."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise UnreadableImage("is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        small = encoding.max_side is None or max(image.size) <= encoding.max_side
        kind = "JPEG" if image.format == "MPO" else image.format  # MPO: a JPEG, and behind it others
        if not (kind in encoding.keep and image.mode in ("L", "RGB") and small):
            return _jpeg(image, encoding), True
        if encoding.check == "decode":
            image.load()
        elif kind == "PNG":
            image.verify()  # the CRC of each chunk
        elif data.rfind(END_OF_IMAGE, image.fp.tell()) < 0:  # type: ignore[union-attr]
            # Pillow has read as far as the first scan, where a thumbnail's end cannot be mistaken for the image's.
            # Without an end the file is most likely cut short. Decoding tells whether pixels are missing.
            image.load()
    except UnidentifiedImageError:
        what = pillow.unknown(data) or "not an image, or is cut short in its header"
        raise UnreadableImage(f"is {what}") from None
    except Exception as error:  # on damaged files Pillow raises whatever its parsing stumbles over
        raise UnreadableImage(" ".join(str(error).split()) or type(error).__name__) from None
    return data, False


def _jpeg(image, encoding: Encoding) -> bytes:
    """Returns an RGB or grey JPEG, upright, because EXIF's orientation is lost, and made smaller with antialiasing."""
    from PIL import Image, ImageOps

    # 4:4:4 keeps the colour of every pixel; a JPEG rarely has more than that of every second.
    subsampling = "4:2:0" if image.format in ("JPEG", "MPO") else "4:4:4"
    image = pillow.of_8_bits(image)
    if encoding.max_side is not None and image.mode in ("L", "RGB"):
        # libjpeg halves the image while it decodes, as long as the filter keeps three times the pixels it needs.
        image.thumbnail((encoding.max_side, encoding.max_side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    image = ImageOps.exif_transpose(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode in ("1", "LA") else "RGB")
        if encoding.max_side is not None:
            image.thumbnail((encoding.max_side, encoding.max_side), Image.Resampling.LANCZOS)
    if max(image.size) > JPEG_SIDE:
        width, height = image.size
        raise UnreadableImage(f"is {width} x {height} pixels, a JPEG at most {JPEG_SIDE} a side: give --max_side")
    image.info.pop("comment", None)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=encoding.quality, subsampling=subsampling)
    return out.getvalue()


def png(pixels: bytes, height: int, width: int, channels: int = 1) -> bytes:
    """Returns an 8-bit grey or RGB PNG without filters (ISO/IEC 15948): the same bytes wherever zlib is the same."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = width * channels
    rows = b"".join(b"\0" + pixels[y * row : (y + 1) * row] for y in range(height))
    header = struct.pack(">2I5B", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
