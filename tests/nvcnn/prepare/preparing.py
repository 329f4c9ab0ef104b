"""Prepares small class folders, and looks at what was written."""

import io
from pathlib import Path

from PIL import Image

from nvcnn.data.tfrecord import decode_example, read_records
from nvcnn.prepare import folder, write
from nvcnn.prepare.blueprint import Blueprint
from nvcnn.prepare.encode import Encoding

SHARDS = (6, 2)


def blueprint(folders: tuple[Path, Path], **changes) -> Blueprint:
    train, val = folders
    encoding = Encoding(("JPEG",), **{k: changes.pop(k) for k in ("max_side", "check") if k in changes})
    return folder.blueprint(train, **{"val": val, "encoding": encoding, "shards": SHARDS} | changes)


def run(folders, out: Path, workers: int = 1, skip_bad: bool = False, **changes) -> None:
    write.write_dataset(blueprint(folders, **changes), out, workers=workers, skip_bad=skip_bad)


def contents(directory: Path) -> dict[str, bytes | None]:
    """Returns the bytes of each file; of a directory None."""
    return {path.name: path.read_bytes() if path.is_file() else None for path in directory.iterdir()}


def inodes(directory: Path) -> dict[str, int]:
    """Returns an inode for each finished shard: a shard that is written again has another."""
    return {path.name: path.stat().st_ino for path in directory.glob("*-of-?????")}


def records(directory: Path, split: str) -> list[bytes]:
    return [r for path in sorted(directory.glob(f"{split}-?????-of-?????")) for r in read_records(path)]


def examples(directory: Path, split: str) -> list[dict]:
    return list(map(decode_example, records(directory, split)))


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
