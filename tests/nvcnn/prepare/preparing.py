"""Preparing small class folders: what the tests of it share."""

from pathlib import Path

from nvcnn.prepare import folder, write
from nvcnn.prepare.blueprint import Blueprint
from nvcnn.prepare.encode import Encoding


def blueprint(folders: tuple[Path, Path], **changes) -> Blueprint:
    train, val = folders
    encoding = Encoding(("JPEG",), **{k: changes.pop(k) for k in ("max_side", "check") if k in changes})
    return folder.blueprint(train, **{"val": val, "encoding": encoding, "shards": (12, 4)} | changes)


def run(folders, out: Path, workers: int = 1, skip_bad: bool = False, **changes) -> None:
    write.write_dataset(blueprint(folders, **changes), out, workers=workers, skip_bad=skip_bad)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
