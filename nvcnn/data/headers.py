"""Reads the headers of image files: whether DALI shows a file as Pillow does, and the depth of a JPEG.

DALI finds an orientation only in EXIF, and there only where it is written as it should be; Pillow finds more.
"""

import re
import struct
from collections.abc import Iterable, Iterator

Bytes = bytes | memoryview
ORIENTATION = 0x0112  # EXIF's tag; its values 2 .. 8 name the transposition that makes an image upright
TURNED = re.compile(rb'tiff:Orientation(="|>)[02-9]')  # in XMP
EXIF = b"Exif\0\0"
TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # of PNG: keywords of XMP, and of EXIF
METADATA = 4 | 8  # flags of WebP: XMP, EXIF
APP1, APP14 = 0xE1, 0xEE  # markers of segments: of EXIF and XMP, of Adobe
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # those of depth, size and channels, behind APPs


def shown_alike(data: Bytes) -> bool:
    """Returns whether DALI shows a JPEG, PNG, BMP or WebP that it can decode as Pillow does. False: ask Pillow."""
    try:
        if data[0] == 0xFF:
            return jpeg_shown_alike(data)
        if data[0] == 0x89:
            return png_shown_alike(data)
        if data[0] == ord("R"):
            return data[12:16] != b"VP8X" or not data[20] & METADATA
    except (IndexError, ValueError, struct.error):  # the file is damaged
        return False
    return True


def jpeg_shown_alike(data: Bytes) -> bool:
    app1, adobe = [], False
    for marker, at, end in segments(data):
        if marker == APP1:
            app1.append(bytes(data[at:end]))
        elif marker == APP14:
            adobe = data[at : at + 5] == b"Adobe"
        elif marker in FRAMES:  # without Adobe's segment DALI shows the negative of CMYK
            return (adobe or data[at + 5] != 4) and orientations_agree(app1)
    return False


def segments(data: Bytes) -> Iterator[tuple[int, int, int]]:
    """Yields marker, start and end of each segment of a JPEG up to the first scan."""
    at = 2
    while (marker := data[at + 1]) != 0xDA:
        if data[at] != 0xFF:
            raise ValueError("no marker")
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        yield marker, at + 4, end
        at = end


def chunks(data: Bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields kind, start and end of each chunk of a PNG."""
    at, kind = 8, b""
    while kind != b"IEND":
        size, kind = struct.unpack_from(">I4s", data, at)
        yield kind, at + 8, at + 8 + size
        at += size + 12  # with its CRC


def png_shown_alike(data: Bytes) -> bool:
    exif = []
    for kind, at, end in chunks(data):
        if kind == b"acTL":  # of an animation DALI shows the first frame, which need not be the image itself
            return False
        if kind == b"eXIf":
            exif.append(EXIF + bytes(data[at:end]))
        elif kind in (b"iTXt", b"tEXt", b"zTXt") and bytes(data[at : at + 24]).startswith(TEXTS):
            text = bytes(data[at:end])
            if kind != b"iTXt" or text[len(TEXTS[0])] or TURNED.search(text):  # the byte says if it is compressed
                return False
    return orientations_agree(exif)


def orientations_agree(blocks: Iterable[bytes]) -> bool:
    """Returns whether DALI finds the same orientation as Pillow in blocks of EXIF and, beside it, of XMP."""
    exif = 0
    for block in blocks:
        if not block.startswith(EXIF):
            if TURNED.search(block):
                return False
        elif (exif := exif + 1) > 1 or not is_plain(block[len(EXIF) :]):
            return False
    return True


def is_plain(tiff: bytes) -> bool:
    """Returns whether the orientation in EXIF's data, if there is one, is a single 16-bit number, as it should be."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return False
    (at,) = struct.unpack_from(f"{order}I", tiff, 4)
    (entries,) = struct.unpack_from(f"{order}H", tiff, at)
    for i in range(entries):
        tag, kind, count = struct.unpack_from(f"{order}HHI4x", tiff, at + 2 + 12 * i)
        if tag == ORIENTATION and (kind, count) != (3, 1):
            return False
    return True


def jpeg_bits(data: Bytes) -> int | None:
    """Returns the bits of a JPEG's values; None for a file that is no JPEG, or whose header is damaged."""
    try:
        if data[:2] == b"\xff\xd8":
            return next(data[at] for marker, at, _ in segments(data) if marker in FRAMES)
    except (IndexError, ValueError, StopIteration):
        pass
    return None
