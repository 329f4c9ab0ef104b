"""Makes a data directory: shuffled shards, their indexes, dataset.json, and manifest.json last.

A `Blueprint` says where the images are and what becomes of each. A pool of processes writes the shards, each whole or
not at all, so a run that was killed goes on where it stopped. What a shard holds depends only on the blueprint.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import as_completed
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from nvcnn.data.dataset import UNFINISHED
from nvcnn.data.processes import worker_pool
from nvcnn.data.shard_source import atomic_writer, index_path
from nvcnn.prepare.blueprint import Blueprint, Shard, digest, shard_paths
from nvcnn.prepare.formats import FORMATS
from nvcnn.prepare.manifest import (
    SUMMARIES,
    as_json,
    is_temporary,
    is_there,
    read_json,
    read_manifest,
    read_part,
    summed,
    write_json,
)
from nvcnn.prepare.progress import progress
from nvcnn.prepare.shards import write_shard
from nvcnn.program import InputError

LOCK_WAIT = 10.0  # seconds that the workers of a killed run may take to end


def write_dataset(blueprint: Blueprint, out: Path, *, workers: int = 1, skip_bad: bool = False) -> None:
    """Writes the data directory `out`, or what is missing of it. The bytes are the same for any `workers`.

    Raises InputError for an unusable `out`, for one that was begun with other flags, and, after everything has been
    read, for unreadable images. With `skip_bad` those are left out instead, and listed in the manifest.
    """
    for split, n in blueprint.shards.items():
        if n > len(blueprint.splits[split]):
            raise InputError(
                f"--shards: {n} {split} shards, but {len(blueprint.splits[split])} {split} images: give fewer"
            )
    check_out(out, blueprint.shards, blueprint.file_format, blueprint.files)
    with locked(out):
        finished = begun(blueprint, out)
        parts: dict[str, dict[str, Any]] = {}  # by shard, in their order
        missing: list[Shard] = []
        for shard in blueprint.shards_in(out):
            part = parts[shard.path.name] = finished.get(shard.path.name, {})
            if part and part["source"] != digest(shard.samples):
                raise InputError(
                    f"--out={out}: {shard.path.name} was made from other images: give the sources it was begun with, "
                    "or another directory"
                )
            if not (part and is_there(shard.path, part)):
                missing.append(shard)
        if not missing and is_as_written(out, beside(blueprint, parts)):
            shutil.rmtree(out / UNFINISHED, ignore_errors=True)
            print(f"{blueprint.title} in {out} is complete")
            return
        try:
            parts |= write_shards(blueprint, out, missing, workers, skip_bad)
            for name, content in beside(blueprint, parts).items():
                with atomic_writer(out / name) as file:
                    file.write(content)
        except OSError as error:
            raise InputError(
                f"--out={out}: {error.strerror}: make room or give another directory, then run again"
            ) from None
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
    encoded = sum(part["encoded_anew"] for part in parts.values())
    bad = sum(len(part["bad"]) for part in parts.values())
    counts = [f"{n} {split} images" for split, n in images(blueprint, parts).items()]
    counts += [f"{encoded} encoded anew"] * (encoded > 0) + [f"{bad} unreadable left out"] * (bad > 0)
    print(f"{blueprint.title} in {out}: {', '.join(counts)}")


def check_out(out: Path, shards: Mapping[str, int], file_format: str, files: Iterable[str] = ()) -> None:
    """Makes the directory. Raises InputError if it is not writable, or holds anything but such a data set."""
    expected = {path for paths in shard_paths(out, shards, file_format).values() for path in paths}
    expected |= {*map(index_path, expected), *(out / name for name in (*files, *SUMMARIES, UNFINISHED))}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out={out}: cannot be made ({error.strerror}): give another directory") from None
    if not os.access(out, os.R_OK | os.W_OK | os.X_OK):
        raise InputError(f"--out={out}: is not readable and writable: give another directory, or the rights")
    for path in sorted(out.iterdir()):
        if is_temporary(path):
            continue
        if path not in expected or path.is_dir() != (path.name == UNFINISHED):
            raise InputError(
                f"--out={out}: holds {path.name}, which is not of this data set: give an empty directory, "
                "or the flags it was begun with"
            )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps other runs out of a directory, and removes what a killed one, or a killed worker, has left half written."""
    directory = os.open(out, os.O_RDONLY)
    try:
        end = time.monotonic() + LOCK_WAIT
        while True:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise InputError(f"--out={out}: another prepare.py is writing there: wait for it") from None
                time.sleep(0.05)
                continue
            except OSError:  # a network file system without locks
                pass
            break
        remove_half_written(out)
        try:
            yield
        finally:
            with suppress(OSError):  # the directory may have gone
                remove_half_written(out)  # of a worker that was killed, and of those that end with it
    finally:
        os.close(directory)


def remove_half_written(out: Path) -> None:
    for path in (*out.iterdir(), *(out / UNFINISHED).glob("*")):
        if is_temporary(path):
            path.unlink(missing_ok=True)


def begun(blueprint: Blueprint, out: Path) -> dict[str, dict[str, Any]]:
    """Returns each finished shard's part of the manifest. Raises InputError if the run was begun with other flags."""
    settings = blueprint.settings()
    manifest, unfinished = out / "manifest.json", out / UNFINISHED
    if manifest.exists():
        text = read_manifest(manifest)
        check_settings(out, text["made_from"], settings)
        return text["shards"]
    try:
        if (unfinished / "flags").exists():
            check_settings(out, read_json(unfinished / "flags"), settings)
        else:
            unfinished.mkdir(exist_ok=True)
            write_json(unfinished / "flags", settings)
    except OSError as error:
        raise InputError(f"--out={out}: {error.strerror}: make room or give another directory") from None
    return {path.stem: read_part(path) for path in unfinished.glob("*.json")}


def check_settings(out: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for name in {**here, **there}:
        if there.get(name) == here.get(name):
            continue
        if name == "dataset":
            raise InputError(f"--out={out}: holds {there.get(name)}, not {here[name]}: give another directory")
        if name == "classes":
            raise InputError(f"--out={out}: was begun with other classes: give its sources, or another directory")
        if name == "shards" and there.get(name, "").count(",") != here[name].count(","):
            which = "with" if "," in there.get(name, "") else "without"
            raise InputError(f"--out={out}: was begun {which} validation images: do so now, or give another directory")
        begun, now = (f"with --{name}={one[name]}" if name in one else f"without --{name}" for one in (there, here))
        raise InputError(f"--out={out}: was begun {begun}, now {now}: give the same flags, or another directory")


def write_shards(
    blueprint: Blueprint, out: Path, shards: list[Shard], workers: int, skip_bad: bool
) -> dict[str, dict[str, Any]]:
    """Writes the shards. Returns their parts of the manifest. Raises InputError for unreadable images."""
    (out / UNFINISHED).mkdir(exist_ok=True)
    write = partial(
        write_shard,
        class_names=blueprint.class_names,
        encode=blueprint.encode,
        file_format=blueprint.file_format,
        skip_bad=skip_bad,
    )
    parts, bad = {}, []
    with worker_pool(workers) as pool, progress(sum(len(shard.samples) for shard in shards)) as update:
        pending = {pool.submit(write, shard): shard for shard in shards}
        for done in as_completed(pending):
            shard, part = pending[done], done.result()
            name = shard.path.name
            parts[name] = part
            bad += part["bad"]
            written = "not written" if part["bad"] and not skip_bad else f"{part['images']} images"
            update(len(shard.samples), f"{name}: {written}", [f"{image}: {why}" for image, why in part["bad"]])
    if bad and not skip_bad:
        name, why = min(bad)
        raise InputError(
            f"{len(bad)} unreadable images, listed above, the first {name}: {why}: repair them and run again, "
            "or leave them out with --skip_bad"
        )
    return parts


def is_as_written(out: Path, files: Mapping[str, bytes]) -> bool:
    return all((out / name).is_file() and (out / name).read_bytes() == content for name, content in files.items())


def images(blueprint: Blueprint, parts: Mapping[str, dict[str, Any]]) -> dict[str, int]:
    """Returns how many images each split has."""
    shards = shard_paths(Path(), blueprint.shards, blueprint.file_format)
    return {split: sum(parts[path.name]["images"] for path in paths) for split, paths in shards.items()}


def beside(blueprint: Blueprint, parts: Mapping[str, dict[str, Any]]) -> dict[str, bytes]:
    """Returns name and content of the files beside the shards. manifest.json is last: it marks a complete directory."""
    declared = {
        "num_classes": len(blueprint.class_names),
        "label_base": FORMATS[blueprint.file_format].label_base,
        "class_names": blueprint.class_names,
        "images": images(blueprint, parts),
    }
    files = {name: text.encode() for name, text in blueprint.files.items()} | {"dataset.json": as_json(declared)}
    manifest = {
        "made_from": blueprint.settings(),
        "images": declared["images"],
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "shards": parts,
    }
    return files | {"manifest.json": summed(manifest)}
