"""Reads ImageNet (ILSVRC2012) from the archives as they are downloaded, without unpacking them.

Russakovsky et al. 2015, arXiv:1409.0575. ILSVRC2012_img_train.tar holds a tar for each class, named after its synset
(n01440764.tar); ILSVRC2012_img_val.tar holds the images of all classes side by side. A label is the place of the
synset in sorted order, counted from 1 in TFRecords, as in TensorFlow's build_imagenet_data and torchvision's folders.

Of validation images the development kit tells the class, by its ILSVRC2012_ID, which is in another order: meta.mat
has the synset of each. It is MATLAB's format.
"""

import math
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from nvcnn.data.archives import content, is_file, opened
from nvcnn.data.processes import worker_pool
from nvcnn.files import to_read
from nvcnn.prepare.blueprint import Blueprint, Sample
from nvcnn.prepare.encode import SUFFIXES, Encoding
from nvcnn.prepare.folder import encode_file, encoding_flags, file_size, scan_folders, to_samples
from nvcnn.prepare.matlab import structures
from nvcnn.program import InputError

SYNSET = re.compile(r"n\d{8}")
SHARDS = (1024, 128)
CLASSES, IMAGES = 1000, {"train": 1_281_167, "validation": 50_000}
META, GROUND_TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
LARGEST = 1 << 22  # bytes of a file of the kit that is read
AGAIN = "give the .tar as it was downloaded"
IDS = ("490", "361", "171", "822", "297")  # how the ground truth begins, in the order of ILSVRC2012_ID


class Devkit(NamedTuple):
    """synsets: those of the validation images, in order of their numbers. words: what each synset means."""

    synsets: list[str]
    words: dict[str, str]


def blueprint(
    train: Path,
    val: Path | None,
    *,
    devkit: Path | None = None,
    synsets: Path | None = None,
    val_labels: Path | None = None,
    encoding: Encoding,
    shards: tuple[int, ...] | None = None,
    seed: int = 1,
    file_format: str = "tfrecord",
    workers: int = 1,
) -> Blueprint:
    """Returns what to write of `train` and `val`, each a tar or a directory. Class folders need no labels beside them.

    synsets: a file of one class per line in order of label, with or without words behind it; none: those of `train`,
    sorted. val_labels: a file of a synset or label per validation image, in order of the numbers in their names.
    Raises InputError for sources that are not ImageNet's, or do not belong together.
    """
    words: dict[str, str] = {}
    kit = None if devkit is None else read_devkit(devkit)
    images = scan_train(train, workers)
    classes = sorted(images)
    if kit is not None:
        words = kit.words
    if synsets is not None:
        classes, given = read_synsets(synsets)
        words = words | given
        for missing, where in (
            (set(images) - set(classes), f"--synsets={synsets}"),
            (set(classes) - set(images), f"--train={train}"),
        ):
            if missing:
                raise InputError(f"{where}: has no {min(missing)}: give the synsets of the training images")
    label = {synset: i for i, synset in enumerate(classes)}
    in_order = ((synset, image) for synset in sorted(images) for image in images.pop(synset))
    splits = {"train": [Sample(name, label[synset], str(train), at, n) for synset, (name, at, n) in in_order]}
    if val is not None:
        splits["validation"] = validation(val, label, kit, val_labels, workers)
    for split, samples in splits.items():
        if len(samples) != IMAGES[split] or len(classes) != CLASSES:
            print(
                f"{len(samples)} {split} images of {len(classes)} classes; the whole of ILSVRC2012 has {IMAGES[split]} "
                f"of {CLASSES}",
                file=sys.stderr,
            )
    return Blueprint(
        "ImageNet",
        tuple(words.get(synset, synset) for synset in classes),
        splits,
        dict(zip(splits, shards or SHARDS, strict=False)),
        partial(encode_file, encoding=encoding),
        order=str(seed),
        file_format=file_format,
        flags=encoding_flags(encoding) | {"seed": seed},
        files={"synsets.txt": "".join(f"{synset}\n" for synset in classes)},
    )


def members(path: Path | str, what: str, at: int = 0, end: float = math.inf) -> Iterator[tarfile.TarInfo]:
    """Yields the files of the tar at the bytes `at` to `end` of a file, without those that macOS adds."""
    with opened(path, what, AGAIN, at=at, end=end) as tar:
        for member in tar:
            if not Path(member.name).name.startswith(".") and is_file(member):
                yield member


def scan_class(path: str, synset: str, at: int, size: int) -> list[tuple[str, int, int]]:
    """Returns (name, offset, bytes) of each image in a class's tar: the `size` bytes at `at` of the training tar."""
    what = f"--train={path}: {synset}.tar"
    found = [(f"{synset}/{Path(m.name).name}", m.offset_data, m.size) for m in members(path, what, at, at + size)]
    if not found:
        raise InputError(f"{what}: holds no images: download it again")
    return sorted(found)


def scan_train(train: Path, workers: int) -> dict[str, list[tuple[str, int, int]]]:
    """Returns (name, offset in the tar or 0, bytes) of each training image, by synset."""
    if train.is_dir():
        folders = scan_folders(train, "--train", workers)
        if other := [name for name in folders if not SYNSET.fullmatch(name)]:
            raise InputError(
                f"--train={train}: {other[0]} is not a synset like n01440764: give ImageNet's class folders, "
                "or use prepare.py folder"
            )
        return {synset: [(name, 0, size) for name, size in images] for synset, images in folders.items()}
    what = f"--train={train}"
    tars: dict[str, tuple[str, str, int, int]] = {}
    for member in members(train, what):
        synset = Path(member.name).stem
        if not (SYNSET.fullmatch(synset) and member.name.endswith(".tar")):
            raise InputError(
                f"{what}: holds {member.name}, not class tars like n01440764.tar: give ILSVRC2012_img_train.tar"
            )
        if synset in tars:
            raise InputError(f"{what}: holds {member.name} twice: {AGAIN}")
        tars[synset] = (str(train), synset, member.offset_data, member.size)
    if not tars:
        raise InputError(f"{what}: is empty: give ILSVRC2012_img_train.tar")
    print(f"{train}: reading the names in {len(tars)} class tars", flush=True)
    with worker_pool(workers) as pool:
        return dict(zip(tars, pool.map(scan_class, *zip(*tars.values(), strict=True)), strict=True))


def validation(
    val: Path, label: Mapping[str, int], kit: Devkit | None, val_labels: Path | None, workers: int
) -> list[Sample]:
    """Returns the validation images from a tar, a directory of images or class folders.

    Images beside each other have names that end in a number: the n-th label is that of number n.
    """
    what = f"--val={val}"
    if val.is_dir():
        try:
            paths = sorted(path for path in val.iterdir() if not path.name.startswith("."))
        except OSError as error:
            raise InputError(f"{what}: cannot be listed ({error.strerror}): make it readable") from None
        if any(path.is_dir() for path in paths):
            folders = scan_folders(val, "--val", workers)
            if unknown := sorted(folders.keys() - label.keys()):
                raise InputError(
                    f"{what}: class {unknown[0]} is not in --train: give the validation images of its classes"
                )
            return sorted(to_samples(val, folders, list(label)), key=lambda sample: Path(sample.name).name)
        found = [(path.name, 0, file_size(path)) for path in paths if path.suffix.lower() in SUFFIXES]
    else:
        found = [(Path(m.name).name, m.offset_data, m.size) for m in members(val, what)]
    if not found:
        raise InputError(f"{what}: holds no images: give ILSVRC2012_img_val.tar, or a directory of its images")
    images = by_number(what, found)
    if val_labels is not None:
        labels, source = read_val_labels(val_labels, label), f"--val_labels={val_labels}"
    elif kit is not None:
        labels, source = [label.get(synset, -1) for synset in kit.synsets], "--devkit"
    else:
        raise InputError(f"{what}: its images are not in class folders: give --devkit, or --val_labels")
    if len(labels) != len(found):
        raise InputError(
            f"{source}: labels {len(labels)} images, but {what} holds {len(found)}: give those of this set"
        )
    samples = []
    for i, number in enumerate(labels, 1):
        if i not in images:
            raise InputError(f"{what}: no image has the number {i}, which {source} labels: give the images of this set")
        name, at, size = images[i]
        if number < 0:
            raise InputError(
                f"{what}: the class of {name} is not in --train: give the validation images of its classes"
            )
        samples.append(Sample(name, number, str(val), at, size))
    return samples


def by_number(what: str, images: list[tuple[str, int, int]]) -> dict[int, tuple[str, int, int]]:
    """Returns images by the number that their names end in, which says what label they have.

    Raises InputError for a name without a number, and for two with the same, which are copies.
    """
    found: dict[int, tuple[str, int, int]] = {}
    for image in sorted(images):
        number = re.search(r"([0-9]+)\.\w+$", image[0])
        if number is None:
            raise InputError(f"{what}: {image[0]} does not end in a number, which says what label is its: remove it")
        if (other := found.setdefault(int(number[1]), image)) is not image:
            raise InputError(f"{what}: {other[0]} and {image[0]} have the same number: remove one of them")
    return found


def read_lines(path: Path, flag: str) -> list[str]:
    """Returns the lines of a text file, without the empty ones."""
    if not str(path).startswith("/dev/fd/"):  # what a shell's <(command) gives is read to its end
        to_read(path)
    try:
        return [line for line in map(str.strip, path.read_text().splitlines()) if line]
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{flag}={path}: cannot be read ({why}): give a text file of one class a line") from None


def read_synsets(path: Path) -> tuple[list[str], dict[str, str]]:
    """Returns the synsets in order of label, and the words behind them."""
    rows = [line.split(maxsplit=1) for line in read_lines(path, "--synsets")]
    for number, (synset, *_) in enumerate(rows, 1):
        if not SYNSET.fullmatch(synset):
            raise InputError(f"--synsets={path}: line {number} begins with {synset}, not a synset like n01440764")
    synsets = [row[0] for row in rows]
    if repeated := [synset for i, synset in enumerate(synsets) if synset in synsets[:i]]:
        raise InputError(f"--synsets={path}: has {repeated[0]} twice: give each class once, in order of label")
    return synsets, {row[0]: row[1] for row in rows if len(row) == 2}


def read_val_labels(path: Path, label: Mapping[str, int]) -> list[int]:
    """Returns zero-based labels from a file of synsets, or of labels that count from 1."""
    lines = read_lines(path, "--val_labels")
    if path.name == GROUND_TRUTH or tuple(lines[:5]) == IDS:
        raise InputError(
            f"--val_labels={path}: is in the order of ILSVRC2012_ID, which labels are not: give --devkit, "
            "whose meta.mat has both"
        )
    labels = []
    for number, line in enumerate(lines, 1):
        if line in label:
            labels.append(label[line])
        elif line.isdecimal() and 1 <= int(line) <= len(label):
            labels.append(int(line) - 1)
        else:
            raise InputError(
                f"--val_labels={path}: line {number} is {line!r}, neither a synset of --train nor a label from 1 to "
                f"{len(label)}"
            )
    return labels


def read_devkit(path: Path) -> Devkit:
    """Reads ILSVRC2012_devkit_t12.tar.gz, or the directory that it unpacks to. Returns what validation needs of it."""
    what = f"--devkit={path}"
    found: dict[str, bytes] = {}
    again = "give ILSVRC2012_devkit_t12.tar.gz, or the directory it unpacks to"
    if path.is_dir():
        try:
            for name in (META, GROUND_TRUTH):
                files = sorted(path.rglob(name))
                if len(files) > 1:
                    raise InputError(f"{what}: holds {files[0]} and {files[1]}: give the directory of one kit")
                if files:
                    found[name] = to_read(files[0]).read_bytes()
        except OSError as error:
            raise InputError(f"{what}: cannot be read ({error.strerror}): {again}") from None
    else:
        with opened(path, what, again, compressed=True) as tar:
            for member in tar:
                if (name := Path(member.name).name) in (META, GROUND_TRUTH):
                    found[name] = content(tar, member, LARGEST)
    for name in (META, GROUND_TRUTH):
        if name not in found:
            raise InputError(f"{what}: has no {name}: {again}")
    synset, words = read_meta(what, found[META])
    try:
        ids = [int(line) for line in found[GROUND_TRUTH].split()]
        return Devkit([synset[number] for number in ids], words)
    except ValueError as error:
        raise InputError(f"{what}: {GROUND_TRUTH} holds no numbers ({error}): download the kit again") from None
    except KeyError as error:
        raise InputError(f"{what}: {META} has no ILSVRC2012_ID {error}: download the kit again") from None


def read_meta(what: str, data: bytes) -> tuple[dict[int, str], dict[str, str]]:
    """Returns the synset of each ILSVRC2012_ID, and the words of each synset."""
    synsets: dict[int, str] = {}
    words: dict[str, str] = {}
    try:
        for row in structures(data, "synsets"):
            number, synset, meaning = (row[field] for field in ("ILSVRC2012_ID", "WNID", "words"))
            if not isinstance(synset, str) or not isinstance(meaning, str):
                raise ValueError(f"it has no name or no words for {number}")
            synsets[int(number)], words[synset] = synset, meaning  # type: ignore[arg-type]
    except Exception as error:  # damaged data is whatever its parsing stumbles over
        raise InputError(f"{what}: meta.mat cannot be read ({error}): download the kit again") from None
    return synsets, words
