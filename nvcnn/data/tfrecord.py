"""TFRecord files of tf.train.Example, without TensorFlow.

A record is: uint64 length, uint32 masked CRC-32C of those 8 bytes, the data, uint32 masked CRC-32C of the data, all
little-endian (tensorflow/core/lib/io/record_writer.h). The data is a protocol buffer (tensorflow/core/example):

    Example { Features features = 1; }     Features { map<string, Feature> feature = 1; }
    Feature { oneof: BytesList = 1, FloatList = 2, Int64List = 3 }, each a list { repeated value = 1; }
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from nvcnn.program import InputError

Values = Sequence[bytes] | Sequence[float] | Sequence[int]
FRAMING = 16  # bytes around the data of a record


def masked_crc(data: bytes) -> int:
    """Returns CRC-32C, rotated right by 15 bits, plus a constant, so that data which holds CRCs has another CRC."""
    try:
        import google_crc32c
    except ImportError:
        raise InputError("TFRecord files need google-crc32c: pip install google-crc32c pillow") from None
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(n: int) -> bytes:
    n &= 0xFFFFFFFFFFFFFFFF  # negative numbers are their 64-bit two's complement
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def _field(number: int, *parts: bytes) -> list[bytes]:
    """Returns the parts of a field of wire type 2: tag and length, and its own. So an image's bytes are copied once."""
    return [_varint(number << 3 | 2) + _varint(sum(map(len, parts))), *parts]


def _feature(values: Values) -> list[bytes]:
    if not values:
        return []
    if isinstance(values[0], bytes):
        return _field(1, *chain.from_iterable(_field(1, v) for v in values))  # type: ignore[arg-type]
    if isinstance(values[0], float):
        return _field(2, *_field(1, struct.pack(f"<{len(values)}f", *values)))
    return _field(3, *_field(1, *(_varint(v) for v in values)))  # type: ignore[arg-type]


def encode_example(features: Mapping[str, Values]) -> bytes:
    """Returns a tf.train.Example of lists of bytes, floats or ints. An empty list is a Feature without a value."""
    entries = (_field(1, *_field(1, name.encode()), *_field(2, *_feature(v))) for name, v in features.items())
    return b"".join(_field(1, *chain.from_iterable(entries)))


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    n = shift = 0
    while True:
        byte = data[at]
        n |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return n, at
        if shift == 70:  # a longer one would take time by the square of its bytes
            raise ValueError("a number of more than ten bytes")


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yields (number, value) of each field of a message: bytes for wire types 1, 2 and 5, int for wire type 0."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        if tag & 7 == 0:
            value, at = _read_varint(data, at)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(tag & 7)
        if size is None:
            if tag & 7 != 2:
                raise ValueError(f"wire type {tag & 7}")
            size, at = _read_varint(data, at)
        if at + size > len(data):
            raise ValueError("a field passes the end")
        yield tag >> 3, data[at : at + size]
        at += size


def _values(feature: bytes) -> list:
    values: list = []
    for kind, data in _fields(feature):
        for _, value in _fields(data):  # type: ignore[arg-type]
            if kind == 1:
                values.append(value)
            elif kind == 2:  # packed, or one by one
                values += struct.unpack(f"<{len(value) // 4}f", value)  # type: ignore[arg-type]
            elif isinstance(value, int):
                values.append(value - (value >> 63 << 64))
            else:
                at = 0
                while at < len(value):
                    n, at = _read_varint(value, at)
                    values.append(n - (n >> 63 << 64))
    return values


def decode_example(data: bytes) -> dict[str, list]:
    """Returns the lists of a tf.train.Example. Raises ValueError when `data` is something else."""
    example: dict[str, list] = {}
    try:
        for _, features in _fields(data):
            for _, entry in _fields(features):  # type: ignore[arg-type]
                pair = dict(_fields(entry))  # type: ignore[arg-type]
                example[pair[1].decode()] = _values(pair.get(2, b""))  # type: ignore[union-attr, arg-type]
    except (IndexError, KeyError, TypeError, AttributeError, struct.error, ValueError) as error:
        raise ValueError(f"not a tf.train.Example: {error}") from error
    return example


def write_record(file: BinaryIO, data: bytes) -> int:
    """Appends one record. Returns its size in the file."""
    length = struct.pack("<Q", len(data))
    for part in (length + struct.pack("<I", masked_crc(length)), data, struct.pack("<I", masked_crc(data))):
        file.write(part)
    return len(data) + FRAMING


def _length(path: Path, header: bytes, number: int, at: int) -> int:
    """Returns how many bytes of data a record's 12-byte header announces."""
    if len(header) == 12 and struct.unpack("<I", header[8:])[0] == masked_crc(header[:8]):
        return struct.unpack("<Q", header[:8])[0]
    raise InputError(
        f"{path}: no TFRecord at byte {at} (record {number}): the file is truncated, damaged or of another format"
    )


def scan(path: Path) -> Iterator[tuple[int, int]]:
    """Yields (offset, size) of each record, reading only the headers. Raises InputError where the file is cut short."""
    at = number = 0
    end = path.stat().st_size
    with open(path, "rb") as file:
        while at < end:
            file.seek(at)
            size = _length(path, file.read(12), number, at) + FRAMING
            if at + size > end:
                raise InputError(f"{path}: record {number} at byte {at} is cut short: copy or make the file again")
            yield at, size
            at, number = at + size, number + 1


def read_records(path: Path, digest: Any = None) -> Iterator[bytes]:
    """Yields the data of each record. Raises InputError at the first whose CRCs do not match, or that is cut short.

    digest: a hash of hashlib, which is updated with every byte of the file.
    """
    with open(path, "rb") as file:
        for number, (at, size) in enumerate(scan(path)):
            header, data, crc = file.read(12), file.read(size - FRAMING), file.read(4)
            if struct.unpack("<I", crc)[0] != masked_crc(data):
                raise InputError(
                    f"{path}: record {number} at byte {at} is damaged (its CRC differs): copy the file again, or "
                    "delete it and prepare again"
                )
            if digest is not None:
                for part in (header, data, crc):
                    digest.update(part)
            yield data
