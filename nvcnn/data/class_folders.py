"""A folder per class, `train/CLASS/**/*.jpg` and `val/CLASS/**/*.jpg` (or another of NAMES), as a source.

A class's number is its place in order of name, so training and validation must have the same classes.
"""

import hashlib
import os
import shlex
import tempfile
from array import array
from collections.abc import Collection
from itertools import accumulate
from pathlib import Path
from typing import Any

from nvcnn.data.source import NAMES, NoSplit, is_utf_8
from nvcnn.files import to_read
from nvcnn.program import InputError

# The suffixes of pillow.FORMATS, in any case.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")


class ClassFolders:
    def __init__(self, paths: list[str], labels: list[int]):
        # One string and two arrays for a million files: worker processes share them, as in ShardSource.
        encoded = [os.fsencode(path) for path in paths]
        self.names = b"\0".join(encoded)
        self.ends = array("q", accumulate(len(path) + 1 for path in encoded))
        self.numbers = array("q", labels)
        self.links: tempfile.TemporaryDirectory | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, i: int) -> str:
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.names[start : self.ends[i] - 1])

    def place(self, info: str) -> str:
        directory, _, number = info.rpartition("/")
        return self.name(int(number)) if self.links and self.links.name == directory else info

    def number(self, place: str) -> int:
        return self.names.split(b"\0").index(os.fsencode(place))

    def read(self, i: int) -> tuple[bytes, int | str]:
        path = Path(self.name(i))
        try:
            return path.read_bytes(), self.numbers[i]
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}): copy or make the data set again") from None

    def firsts(self) -> list[int]:
        return []  # labels are those of the folders

    def digest(self) -> str:
        above = os.path.commonpath([self.name(0), self.name(len(self) - 1)])  # the split's folder, or the one class's
        return hashlib.sha256(self.names.replace(os.fsencode(above), b"") + self.numbers.tobytes()).hexdigest()

    def without(self, left_out: Collection[int]) -> "ClassFolders":
        kept = sorted(set(range(len(self))) - set(left_out))
        return ClassFolders([self.name(i) for i in kept], [self.numbers[i] for i in kept])

    def reader(self, dali: Any, order: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        files = [self.name(i) for i in range(len(self))]
        if odd := [i for i, file in enumerate(files) if not is_utf_8(file)]:  # DALI takes no such name, but a link
            there = self.links is not None  # another reader has them, too
            self.links = self.links or tempfile.TemporaryDirectory(prefix="nvcnn-")
            for i in odd:
                link = f"{self.links.name}/{i}"
                if not there:
                    os.symlink(os.path.abspath(files[i]), link)
                files[i] = link
        return dali.fn.readers.file(files=files, labels=self.numbers.tolist(), **order, **options)

    def labels(self, output: Any) -> list[int | str]:
        return output.as_array().reshape(-1).tolist()


def split_folder(directory: Path, split: str) -> Path | None:
    """Returns the folder of a split. A test/ with other folders than train/ has is none: many hold images alone."""
    folder = next((directory / name for name in NAMES[split] if (directory / name).is_dir()), None)
    train = directory / "train"
    if folder == directory / "test" and train.is_dir() and class_names(folder) != class_names(train):
        return None
    return folder


def set_aside(train: Path, directory: Path) -> str:
    """Returns what to do with class folders that have none beside them to validate on."""
    out = f"{directory if directory.name not in ('', '..') else directory.resolve()}-prepared"
    command = shlex.join(
        ["python", "launch/prepare.py", "folder", f"--train={train}", "--val_share=0.1", f"--out={out}"]
    )
    return f"set a tenth of each class aside by `{command}` and give --data_dir={out}"


def holds_images(folder: Path) -> bool:
    """Returns whether there are images in a folder itself."""
    return any(entry.name.lower().endswith(SUFFIXES) for entry in os.scandir(folder))


def class_names(folder: Path) -> list[str]:
    """Returns the names of the folders in `folder`, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is a folder, and False for a link to itself, where entry.is_dir() raises."""
    return Path(entry.path).is_dir() if entry.is_symlink() else entry.is_dir()


def links_above(folder: Path, name: str) -> bool:
    """Returns whether `name` in `folder`, as it is written, is a link to a folder that it is in."""
    link = folder / name
    return link.is_symlink() and any(
        (folder / above).resolve().is_relative_to(link.resolve()) for above in Path(name).parents
    )


def image_files(folder: Path, name: str, suffixes: tuple[str, ...]) -> tuple[list[str], int]:
    """Returns the images in folder/name at any depth, as sorted paths below `folder`, and how many other files it has.

    Links are followed, hidden files are not counted. Raises InputError for a link that would make the listing endless.
    """
    images, others = [], 0
    pending = [name]
    while pending:
        below = pending.pop()
        if links_above(folder, below):
            raise InputError(f"{folder / below}: links to a folder above it: remove it")
        for entry in os.scandir(folder / below):
            if entry.name.startswith("."):
                continue
            if is_folder(entry):
                pending.append(f"{below}/{entry.name}")
            elif entry.name.lower().endswith(suffixes):
                if not entry.is_file(follow_symlinks=False):
                    to_read(Path(entry.path))
                images.append(f"{below}/{entry.name}")
            else:
                others += 1
    return sorted(images), others


def find_classes(directory: Path) -> list[str]:
    """Returns the classes of training and validation, sorted. Raises InputError when they differ."""
    folders = [folder for split in NAMES if (folder := split_folder(directory, split))]
    classes = [class_names(folder) for folder in folders]
    if not all(classes):
        empty = folders[classes.index([])]
        raise InputError(f"{empty}: holds no class folders: put the images of each class into a folder there")
    for here, there in ((0, -1), (-1, 0)):
        if absent := sorted(set(classes[there]) - set(classes[here])):
            raise InputError(
                f"{folders[here]}: has no folder {absent[0]}, which {folders[there]} has ({len(absent)} such): "
                "a class's number is its place in order of name, so both must have the same"
            )
    return classes[0]


def open_class_folders(directory: Path, split: str, classes: list[str]) -> ClassFolders:
    """Returns the source of a split. Raises InputError for a class without images: most likely a copy broke off."""
    folder = split_folder(directory, split)
    if folder is None:
        what = f"--data_dir={directory}: no folder {' or '.join(NAMES[split])} there"
        if split == "train":
            raise InputError(f"{what}: prepare the data set, or correct the path")
        raise NoSplit(f"{what}, with the classes of train/: {set_aside(directory / 'train', directory)}")
    paths, labels = [], []
    for label, name in enumerate(classes):
        found, _ = image_files(folder, name, SUFFIXES)
        if not found:
            raise InputError(f"{folder / name}: holds no images (*{', *'.join(SUFFIXES)}): copy the data set again")
        paths += [f"{folder}/{path}" for path in found]
        labels += [label] * len(found)
    return ClassFolders(paths, labels)
