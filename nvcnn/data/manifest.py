"""manifest.json, written last: what a finished data directory holds, and what it was made from."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvcnn.data.tfrecord import atomic_writer, index_path
from nvcnn.errors import InputError

UNFINISHED = ".unfinished"  # directory in --out: the flags of a run, and a part of the manifest for each finished shard
SUMMARIES = ("dataset.json", "manifest.json")


def is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): delete it, and prepare the data set again") from None


def read_manifest(path: Path) -> dict[str, Any]:
    text = read_json(path)
    if not (isinstance(text, dict) and {"made_from", "images", "shards"} <= text.keys()):
        raise InputError(f"{path}: is no manifest of prepare.py: remove it, and prepare the data set again")
    return text


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_writer(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())


def is_there(shard: Path, part: Mapping[str, Any]) -> bool:
    with suppress(FileNotFoundError):
        return shard.stat().st_size == part["bytes"] and index_path(shard).exists()
    return False


def is_complete(out: Path, title: str, file_format: str) -> bool:
    """Whether `out` holds all of a data set that only ever has one content; says so."""
    manifest = out / "manifest.json"
    if not manifest.exists():
        return False
    text = read_manifest(manifest)
    made_from = text["made_from"]
    complete = (
        (made_from["dataset"], made_from["format"]) == (title, file_format)
        and (out / "dataset.json").exists()
        and all(is_there(out / name, part) for name, part in text["shards"].items())
    )
    if complete:
        print(f"{title} in {out} is complete")
    return complete
