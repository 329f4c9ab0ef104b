"""Compares a data directory with its manifest.json: sizes, SHA-256, CRCs of records, indexes."""

import hashlib
from collections.abc import Mapping
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nvcnn.data.dataset import read_dataset_json
from nvcnn.data.processes import worker_pool
from nvcnn.data.shard_source import index_path
from nvcnn.files import to_read
from nvcnn.prepare.formats import AGAIN, FORMATS
from nvcnn.prepare.manifest import is_temporary, read_manifest, sha256_of
from nvcnn.prepare.progress import progress
from nvcnn.program import InputError


def verify(directory: Path, workers: int) -> None:
    """Reads every byte and compares with manifest.json: sizes, SHA-256, CRCs of records, indexes.

    Raises InputError for the first file, in order, that is not as it was written. All bad shards are printed.
    """
    manifest = directory / "manifest.json"
    if not manifest.exists():
        raise InputError(f"{manifest}: is missing, so nothing here can be verified: prepare the data set to its end")
    text = read_manifest(manifest)
    if read_dataset_json(directory / "dataset.json").get("images") != text["images"]:
        raise InputError(f"{directory}/dataset.json: its images are not those of manifest.json: prepare it again")
    for name, sha256 in text["files"].items():
        if sha256_of(directory / name) != sha256:
            raise InputError(f"{directory / name}: is missing, or not as it was written: prepare again")
    shards = text["shards"]
    for path in sorted(directory.glob("*-of-*")):
        if path.name.removesuffix(".idx") not in shards and not is_temporary(path):
            raise InputError(f"{path}: is not in manifest.json: remove it, or prepare the data set anew")
    bad: list[str] = []
    with worker_pool(workers) as pool, progress(sum(part["images"] for part in shards.values())) as update:
        check = partial(check_shard, file_format=text["made_from"]["format"])
        # In order, so that the first bad shard is named whichever is read first.
        pending = [pool.submit(check, directory / name, part) for name, part in shards.items()]
        for done, (name, part) in zip(pending, shards.items(), strict=True):
            try:
                done.result()
                update(part["images"], f"{name}: {part['images']} images, as written", [])
            except InputError as error:
                bad.append(str(error))
                update(part["images"], f"{name}: not as written", bad[-1:])
    if bad:
        raise InputError(bad[0] + (f" ({len(bad)} of {len(shards)} shards, listed above)" if len(bad) > 1 else ""))
    print(f"{directory}: {len(shards)} shards with {sum(text['images'].values())} images are as they were written")


def check_shard(path: Path, part: Mapping[str, Any], file_format: str) -> None:
    """Checks one shard and its index, in a worker. Raises InputError if one is not as it was written."""
    try:
        size, sha256 = to_read(path).stat().st_size, hashlib.sha256()
        lines = FORMATS[file_format].read(path, sha256)
        index = to_read(index_path(path)).read_text("utf-8", "replace")  # damage may be any bytes
    except OSError as error:
        raise InputError(
            f"{error.filename}: cannot be read ({error.strerror}): copy the file again, or prepare again"
        ) from None
    source = FORMATS[file_format].source
    pairs = enumerate(zip_longest(index.splitlines()[source.header.count("\n") :], lines))
    where = next((f" at record {i}" for i, (one, other) in pairs if one != other), "")  # as far as the index tells
    if size != part["bytes"]:
        raise InputError(f"{path}: has {size} bytes, not the {part['bytes']} of manifest.json{where}: {AGAIN}")
    if sha256.hexdigest() != part["sha256"]:
        raise InputError(f"{path}: holds other records than were written{where} (its SHA-256 differs): {AGAIN}")
    if index != source.index_text(lines):
        raise InputError(f"{index_path(path)}: is wrong{where}: {AGAIN}")
