"""manifest.json, written last: what a finished data directory holds, and what it was made from."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvcnn.data.shard_source import atomic_writer, index_path
from nvcnn.files import from_json, to_read
from nvcnn.prepare.formats import FORMATS
from nvcnn.program import InputError

SUMMARIES = ("dataset.json", "manifest.json")
KEYS = {"made_from", "images", "files", "shards"}  # of the manifest, beside its SHA-256
# What the manifest says of a shard.
PART = {"images": int, "bytes": int, "sha256": str, "encoded_anew": int, "bad": list, "source": str}


def is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = from_json(to_read(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): delete it, and prepare the data set again") from None
    if not isinstance(values, dict):
        raise not_ours(path)
    return values


def not_ours(path: Path) -> InputError:
    return InputError(f"{path}: was not written by prepare.py: delete it, and prepare the data set again")


def is_part(values: Any) -> bool:
    return isinstance(values, dict) and all(isinstance(values.get(name), kind) for name, kind in PART.items())


def read_part(path: Path) -> dict[str, Any]:
    """Returns a finished shard's part of the manifest. Raises InputError if prepare.py did not write it."""
    part = read_json(path)
    if not is_part(part):
        raise not_ours(path)
    return part


def read_manifest(path: Path) -> dict[str, Any]:
    """Returns "made_from", a blueprint's settings; "images" of each split; "shards"; and SHA-256 of the other "files".

    Raises InputError if prepare.py did not write it. Directories that its first versions made have no "files", and no
    SHA-256 of all that.
    """
    text = read_json(path)
    if text.keys() - KEYS and path.read_bytes() != summed(text):
        raise InputError(f"{path}: is damaged (its SHA-256 differs): copy it again, or delete it and prepare again")
    if not (
        all(isinstance(text.get(name), dict) for name in ("made_from", "images", "shards"))
        and text["made_from"].get("format") in list(FORMATS)  # a list has no hash
        and all(map(is_part, text["shards"].values()))
        and all(isinstance(n, int) for n in text["images"].values())
        and isinstance(text.get("files", {}), dict)
    ):
        raise not_ours(path)
    return {"files": {}} | text


def as_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def summed(text: Mapping[str, Any]) -> bytes:
    """Returns a manifest with its own SHA-256, as it is written."""
    content = {name: value for name, value in text.items() if name in KEYS}
    return as_json(content | {"sha256": hashlib.sha256(as_json(content)).hexdigest()})


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_writer(path) as file:
        file.write(as_json(values))


def sha256_of(path: Path) -> str | None:
    """Returns the SHA-256 of a file that fits into memory; None if it does not exist."""
    with suppress(FileNotFoundError):
        return hashlib.sha256(to_read(path).read_bytes()).hexdigest()
    return None


def is_there(shard: Path, part: Mapping[str, Any]) -> bool:
    """Returns whether a shard of the right size and its index exist."""
    with suppress(FileNotFoundError):
        return shard.stat().st_size == part["bytes"] and index_path(shard).exists()
    return False


def is_complete(out: Path, title: str, file_format: str) -> bool:
    """Returns, and prints, whether `out` holds all of a data set whose content never changes."""
    manifest = out / "manifest.json"
    if not manifest.exists():
        return False
    text = read_manifest(manifest)
    made_from = text["made_from"]
    complete = (
        (made_from.get("dataset"), made_from["format"]) == (title, file_format)
        and (out / "dataset.json").exists()
        and all(sha256_of(out / name) == sha256 for name, sha256 in text["files"].items())
        and all(is_there(out / name, part) for name, part in text["shards"].items())
    )
    if complete:
        print(f"{title} in {out} is complete")
    return complete
