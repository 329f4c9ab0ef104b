"""MATLAB's files: what scipy has written is read as it was, in all forms in which MATLAB stores texts and numbers."""

import io
import struct
import zlib

import numpy as np
import pytest

from nvcnn.prepare.matlab import structures

scipy_io = pytest.importorskip("scipy.io")


@pytest.mark.parametrize("packed", [False, True])
def test_what_scipy_writes(packed):
    rows = [(1.0, "n0", "gray, grey"), (2.0**40, "n1", "naïve, 鶴"), (3.5, "n2", "")]
    array = np.array([(*row, [1.0, 2.0], {"a": 1.0}) for row in rows], [(name, "O") for name in "abcde"])
    file = io.BytesIO()
    scipy_io.savemat(file, {"other": np.zeros(9), "synsets": array[:, None]}, do_compression=packed)
    expected = [{"a": a, "b": b, "c": c, "d": None, "e": None} for a, b, c in rows]
    assert list(structures(file.getvalue(), "synsets")) == expected


def element(order: str, kind: int, content: bytes, short: bool = False) -> bytes:
    if short:
        return struct.pack(f"{order}I", len(content) << 16 | kind) + content.ljust(4, b"\0")
    return struct.pack(f"{order}II", kind, len(content)) + content + bytes(-len(content) % 8)


def array(order: str, class_: int, *parts: bytes, name: bytes = b"") -> bytes:
    flags = element(order, 6, struct.pack(f"{order}II", class_, 0))
    size = element(order, 5, struct.pack(f"{order}ii", 1, 1))
    return element(order, 14, flags + size + element(order, 1, name) + b"".join(parts))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("kind", "content", "codec"), [(2, "B", "latin-1"), (4, "H", "utf-16"), (16, "d", "utf-8"), (17, "f", "utf-16")]
)
def test_other_forms(order, kind, content, codec):
    """Of both orders of bytes; numbers are stored as small as they can be, and in the tag where there is room."""
    text = "né".encode(codec if "16" not in codec else codec + ("-le" if order == "<" else "-be"))
    number = {"B": 2, "H": 4, "d": 9, "f": 7}[content]
    values = (
        array(order, 6, element(order, number, struct.pack(order + content, 7), short=content != "d")),
        array(order, 4, element(order, kind, text, short=len(text) <= 4)),
    )
    names = element(order, 5, struct.pack(f"{order}i", 3), short=True), element(order, 1, b"id\0no\0")
    found = array(order, 2, *names, *values, *values, name=b"synsets")
    header = bytes(126) + (b"IM" if order == "<" else b"MI")
    expected = [{"id": 7, "no": "né"}] * 2
    assert list(structures(header + found, "synsets")) == expected
    both = [zlib.compress(one) for one in (found.replace(b"synsets", b"others!"), found)]
    packed = b"".join(struct.pack(f"{order}II", 15, len(one)) + one for one in both)  # without padding between them
    assert list(structures(header + packed, "synsets")) == expected
    for cut in range(8, len(found), 8):
        with pytest.raises((ValueError, struct.error)):
            list(structures(header + found[:cut], "synsets"))


def test_what_it_holds_is_bounded(monkeypatch):
    monkeypatch.setattr("nvcnn.prepare.matlab.MOST", 1000)
    packed = zlib.compress(array("<", 2, bytes(100_000), name=b"synsets"))
    with pytest.raises(ValueError, match="has more than 1000 bytes"):
        list(structures(bytes(126) + b"IM" + struct.pack("<II", 15, len(packed)) + packed, "synsets"))
