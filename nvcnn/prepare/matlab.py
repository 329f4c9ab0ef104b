"""Structures of texts and numbers in MATLAB's files of level 5, as meta.mat of ImageNet's kit is.

A file is 128 bytes of header and elements; an element is its type and size, uint32 each, and its content, filled up to
8 bytes. One of type COMPRESSED holds another one, one of type MATRIX holds elements: flags, dimensions, name, and what
the array's class asks for ("MAT-File Format", https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf).
scipy.io.loadmat reads more of it, and crashes at what a stranger can write.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from itertools import islice

HEADER = 128  # bytes
MATRIX, COMPRESSED = 14, 15  # types of an element
NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}  # struct's formats
TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16", 18: "utf-32"}
STRUCTURES, TEXT, NUMERIC = 2, 4, range(6, 16)  # classes of an array
MOST = 1 << 24  # bytes of an array when it is no more compressed; that of ImageNet's kit has 2 million


def elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Yields type and content of each element."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        if kind >> 16:  # a short one: its content is where others have their size
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(data):
            raise ValueError("it is cut short")
        yield kind, data[start : start + size]
        at = start + size if kind == COMPRESSED else at + 8 + 8 * math.ceil((start + size - at - 8) / 8)


def class_of(flags: bytes, order: str) -> int:
    return struct.unpack_from(f"{order}I", flags)[0] & 0xFF


def value(data: bytes, order: str) -> str | float | None:
    """Returns the text or the number that an array is; None for other ones."""
    parts = list(islice(elements(data, order), 4))
    if len(parts) < 4:  # it is empty
        return None
    (_, flags), _, _, (kind, content) = parts
    if class_of(flags, order) == TEXT:
        codec = TEXTS[kind]
        return content.decode(codec + ("-le" if order == "<" else "-be") * codec.startswith(("utf-16", "utf-32")))
    if class_of(flags, order) in NUMERIC and len(content) == struct.calcsize(NUMBERS[kind]):
        return struct.unpack(order + NUMBERS[kind], content)[0]
    return None


def structures(data: bytes, name: str) -> Iterator[dict[str, str | float | None]]:
    """Yields texts and numbers of each structure of the array `name`, by field; None for other values.

    Raises ValueError, or what parsing stumbles over, for data that is damaged or has no such array.
    """
    order = {b"IM": "<", b"MI": ">"}.get(data[HEADER - 2 : HEADER])
    if not order:
        raise ValueError("it is not of MATLAB's level 5")
    for kind, content in elements(data[HEADER:], order):
        if kind == COMPRESSED:
            packed = zlib.decompressobj()
            content = packed.decompress(content, MOST)
            if not packed.eof:
                raise ValueError(f"an array is cut short, or has more than {MOST} bytes")
            kind, content = next(elements(content, order))
        if kind != MATRIX:
            continue
        parts = (part for _, part in elements(content, order))
        flags, _, its_name = islice(parts, 3)
        if class_of(flags, order) == STRUCTURES and its_name == name.encode():
            (length,), names = struct.unpack(f"{order}I", next(parts)), next(parts)
            fields = [names[at : at + length].split(b"\0")[0].decode() for at in range(0, len(names), length)]
            values = (value(part, order) for part in parts)
            while row := list(islice(values, len(fields))):
                yield dict(zip(fields, row, strict=True))
            return
    raise ValueError(f"it has no structures called {name}")
