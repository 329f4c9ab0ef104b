"""Reads class folders DIR/<class>/**/<image> like torchvision's ImageFolder. Classes are numbered in order of name."""

import math
import random
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from nvcnn.data.class_folders import class_names, image_files
from nvcnn.data.processes import worker_pool
from nvcnn.data.source import NAMES
from nvcnn.files import to_read
from nvcnn.prepare.blueprint import Blueprint, Sample, read_sample
from nvcnn.prepare.encode import SUFFIXES, Encoding, standard
from nvcnn.program import InputError

FLAGS = {"train": "train", "val": "validation"}  # and the split that it is of
SPLITS = {*NAMES["train"], *NAMES["validation"]}  # names of the folders above class folders
SHARD_BYTES = 1 << 27  # source files of a shard, unless --shards is given


def scan_class(directory: Path, name: str) -> tuple[list[tuple[str, int]], int]:
    """Returns (path below `directory`, bytes) of each image of a class, in order, and the number of other files.

    Raises InputError for what cannot be listed.
    """
    try:
        images, others = image_files(directory, name, SUFFIXES)
        return [(path, file_size(directory / path)) for path in images], others
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}): make it readable") from None


def file_size(path: Path) -> int:
    """Returns the bytes of a file, and 0 for a link to nowhere, which becomes an unreadable image."""
    return to_read(path).stat().st_size if path.exists() else 0


def scan_folders(directory: Path, flag: str, workers: int) -> dict[str, list[tuple[str, int]]]:
    """Returns the images of each class, in order of name. Raises InputError when there are none."""
    try:
        classes = class_names(directory)
    except OSError as error:
        raise InputError(f"{flag}={error.filename}: {error.strerror}: give a directory of class folders") from None
    if not classes:
        raise InputError(f"{flag}={directory}: holds no class folders: give the directory above them")
    if set(classes) <= SPLITS:
        first = {to: [name for name in NAMES[split] if name in classes][:1] for to, split in FLAGS.items()}
        give = " and ".join(f"--{to}={directory}/{name}" for to, names in first.items() for name in names)
        raise InputError(
            f"{flag}={directory}: holds {' and '.join(classes)}, whose folders are the classes: give {give}"
        )
    print(f"{directory}: listing {len(classes)} class folders", flush=True)
    with worker_pool(workers) as pool:
        found = dict(zip(classes, pool.map(partial(scan_class, directory), classes), strict=True))
    if others := sum(n for _, n in found.values()):
        print(f"{directory}: {others} files are left out, whose names are not those of images", file=sys.stderr)
    for name, (images, _) in found.items():
        if not images:
            raise InputError(f"{flag}={directory}: {name} holds no images ({', '.join(SUFFIXES)}): remove it")
    return {name: images for name, (images, _) in found.items()}


def to_samples(directory: Path, folders: Mapping[str, list[tuple[str, int]]], classes: list[str]) -> list[Sample]:
    label = {name: i for i, name in enumerate(classes)}
    return [
        Sample(path, label[name], str(directory), 0, size) for name, images in folders.items() for path, size in images
    ]


def encode_file(sample: Sample, encoding: Encoding) -> tuple[bytes, bool]:
    return standard(read_sample(sample), encoding)


def divide(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Returns training and validation images. Validation gets the same share of each class, chosen by `seed`."""
    of_class: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        of_class.setdefault(sample.label, []).append(i)
    chosen: set[int] = set()
    for label, members in of_class.items():
        chosen.update(random.Random(f"{seed} validation {label}").sample(members, round(share * len(members))))
    return [s for i, s in enumerate(samples) if i not in chosen], [samples[i] for i in sorted(chosen)]


def default_shards(splits: Mapping[str, list[Sample]]) -> list[int]:
    """Returns a number of files for each split: one for 128 MB of images."""
    return [min(len(s), math.ceil(sum(image.size for image in s) / SHARD_BYTES) or 1) for s in splits.values()]


def blueprint(
    train: Path,
    *,
    val: Path | None = None,
    val_share: float | None = None,
    encoding: Encoding,
    shards: tuple[int, ...] | None = None,
    seed: int = 1,
    file_format: str = "tfrecord",
    workers: int = 1,
) -> Blueprint:
    """Returns what to write of `train`, and to validate on, of `val` or `val_share` of each class."""
    folders = scan_folders(train, "--train", workers)
    classes = list(folders)
    splits = {"train": to_samples(train, folders, classes)}
    if val is not None:
        folders = scan_folders(val, "--val", workers)
        if unknown := sorted(folders.keys() - set(classes)):
            raise InputError(f"--val={val}: class {unknown[0]} is not in --train={train}: remove it, or add it there")
        splits["validation"] = to_samples(val, folders, classes)
    elif val_share is not None:
        splits["train"], splits["validation"] = divide(splits["train"], val_share, seed)
        if not (splits["train"] and splits["validation"]):
            raise InputError(f"--val_share={val_share}: leaves no image for training or none for validation")
    counts = shards or default_shards(splits)
    return Blueprint(
        "Class folders",
        tuple(classes),
        splits,
        dict(zip(splits, counts, strict=False)),
        partial(encode_file, encoding=encoding),
        order=str(seed),
        file_format=file_format,
        flags=encoding_flags(encoding) | {"seed": seed, "val_share": val_share},
    )


def encoding_flags(encoding: Encoding) -> dict[str, int | str | None]:
    return {"max_side": encoding.max_side, "quality": encoding.quality, "check": encoding.check}
