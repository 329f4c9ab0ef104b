"""Files that are read."""

import json
import os
import re
import stat
import zipfile
from pathlib import Path
from typing import Any

from nvcnn.program import InputError


def to_read(path: Path) -> Path:
    """Returns the path. Raises InputError for a named pipe, a socket or a device, which would keep a reader waiting.

    A file that is missing or may not be read is for the reader to say.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return path
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return path
    kind = "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    raise InputError(f"{path}: is {kind}, not a file: remove it, or give another path")


def from_json(text: str | bytes) -> Any:
    """Returns what JSON says. Raises ValueError for all that cannot be read, also where Python's reader has another."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


SAFETENSORS = "a safetensors file"
KINDS = {  # how a file begins: what it is
    rb"$": "an empty file",
    rb"\xff\xd8\xff": "a JPEG",
    rb"\x89PNG": "a PNG",
    rb"GIF8": "a GIF",
    rb"RIFF.{4}WEBP": "a WebP",
    rb"\x89HDF": "an HDF5 file",
    rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd": "a compressed file",
    rb".{257}ustar": "a tar",
    rb".{5}\0{3}\{": SAFETENSORS,
    rb"version https://git-lfs": "a pointer of Git LFS (`git lfs pull` fetches the file)",
    rb"\s*<": "a web page",
    rb"\s*[{\[]": "a JSON file",
    rb"[\t\n\r -~]+$": "a text file",
}


def what_is(path: Path) -> str:
    """Returns what a file is by its name or its first bytes; an empty text if neither tells, or it cannot be read."""
    try:
        with to_read(path).open("rb") as file:
            start = file.read(512)
    except OSError:
        return ""
    if path.suffix == ".onnx":
        return "an ONNX model"
    if start.startswith(b"PK"):
        try:
            whole = zipfile.is_zipfile(path)
        except zipfile.BadZipFile:  # it says that it has further parts
            whole = False
        if not whole:
            return "a zip archive that is cut short"
    return next((kind for begin, kind in KINDS.items() if re.match(begin, start, re.DOTALL)), "")
