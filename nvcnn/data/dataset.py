"""Finds the data set in a directory: what kind of files it holds, and what the labels mean."""

import fnmatch
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from nvcnn.data.class_folders import find_classes, holds_images, open_class_folders, set_aside, split_folder
from nvcnn.data.records import Records
from nvcnn.data.source import NAMES, VALIDATION, Source
from nvcnn.data.tars import Tars
from nvcnn.files import from_json, to_read
from nvcnn.program import InputError

PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip")
MOST = 10_000_000  # classes: a network is made for as many as dataset.json says
UNFINISHED = ".unfinished"  # a directory that is there while prepare.py has not finished


@dataclass(frozen=True)
class Dataset:
    """The samples of a directory's splits "train" and "validation".

    Labels are label_base .. label_base + num_classes - 1. open: returns the source of a split, and is called once.
    """

    directory: Path
    num_classes: int
    label_base: int
    class_names: tuple[str, ...] | None
    open: Callable[[str], Source] = field(repr=False, compare=False)
    opened: dict[str, Source] = field(default_factory=dict, repr=False, compare=False)
    weights: Path | None = field(default=None, compare=False)  # whose classes these are, if not those of flags

    def source(self, split: str) -> Source:
        """Returns the samples of a split. Raises InputError for files that are missing or cannot be trained on."""
        if split not in self.opened:
            self.opened[split] = self.open(split)
        return self.opened[split]

    def count(self, split: str) -> int:
        """Returns the number of images of a split."""
        return len(self.source(split))

    def without(self, split: str, left_out: Collection[int]) -> "Dataset":
        """Returns this data set without some samples of a split."""
        return replace(self, opened={**self.opened, split: self.source(split).without(left_out)})

    def zero_based(self, label: int | str, name: str) -> int:
        """Returns the class of a label. Raises InputError, which starts with the sample's `name`, if it has none."""
        if isinstance(label, str):
            wrong = f"its label {label[:20]!r} is not a number" if label else "it has no number as its label"
            raise InputError(f"{name}: {wrong}: make the file again")
        if not 0 <= label - self.label_base < self.num_classes:
            last = self.label_base + self.num_classes - 1
            advice = "set --num_classes and --label_base to those of the data"
            if self.weights:
                advice = f"those are the classes of {self.weights}, give the data of these weights"
            raise InputError(f"{name}: label {label} is outside {self.label_base} .. {last}: {advice}")
        return label - self.label_base


def find_dataset(
    data_dir: str | Path,
    *,
    num_classes: int | None,
    label_base: int | None,
    split: str,
    lenient: bool = False,
    weights: Path | None = None,
) -> Dataset:
    """Returns the data set in `data_dir` after checking a split: files, indexes (missing ones are built), first labels.

    What the labels of TFRecords and WebDataset tars mean comes from dataset.json; without it from `num_classes` and
    `label_base`, else 1000 and 1. Class folders say it themselves.
    lenient: leaves out the checks that a check of every sample makes as well.
    weights: the file that says `num_classes` and `label_base`; None: flags do.
    Raises InputError for anything that training would fail on later.
    """
    directory = Path(data_dir)
    flag = f"--data_dir={data_dir}"
    try:
        kind = find_kind(directory)
        if (directory / UNFINISHED).exists() and not (directory / "manifest.json").exists():
            raise InputError(f"{flag}: prepare.py has not finished there: give its command again")
        declared = read_dataset_json(directory / "dataset.json")
        open_split: Callable[[str], Source]
        if kind == "class folders":
            classes = find_classes(directory)
            own = {"num_classes": len(classes), "label_base": 0, "class_names": classes}
            for name, value in own.items():
                if declared.get(name) not in (None, value):
                    raise InputError(f"{directory}/dataset.json: {name} is not that of the class folders: remove it")
            declared |= own
            open_split = partial(open_class_folders, directory, classes=classes)
        else:
            open_split = partial((Tars if kind == "tars" else Records).find, directory, lenient=lenient)
        for name, value in (("num_classes", num_classes), ("label_base", label_base)):
            if value is not None and value != declared.get(name, value):
                if weights:
                    raise InputError(
                        f"{flag}: its {name} is {declared[name]}, but that of {weights} is {value}: "
                        "give the data of these weights"
                    )
                where = " has" if kind == "class folders" else "/dataset.json says"
                raise InputError(f"--{name}={value}: {directory}{where} {declared[name]}: leave the flag out")
        names = declared.get("class_names")
        dataset = Dataset(
            directory,
            declared.get("num_classes", 1000 if num_classes is None else num_classes),
            declared.get("label_base", 1 if label_base is None else label_base),
            None if names is None else tuple(names),
            open_split,
            weights=weights,
        )
        source = dataset.source(split)
        for i in () if lenient else source.firsts():  # a wrong range of labels is found before training starts
            dataset.zero_based(source.read(i)[1], source.name(i))
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None
    images, promised = len(source), declared.get("images", {}).get(split)
    if images == 0:
        raise InputError(f"{flag}: its {split}-* files hold no images: prepare the data set again")
    if promised not in (None, images):
        raise InputError(
            f"{flag}: {images} {split} images, but dataset.json says {promised}: a shard is missing, or extra"
        )
    return dataset


def find_kind(directory: Path) -> str:
    """Returns "TFRecords", "tars" or "class folders". Raises InputError unless `directory` holds exactly one kind."""
    flag = f"--data_dir={directory}"
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise InputError(f"{flag}: {error.strerror}: prepare a data set there, or correct the path") from None
    if not names:
        raise InputError(f"{flag}: is empty: prepare a data set there, or correct the path")

    def shards(name: str) -> dict[str, str]:
        """Returns an example of each kind of shards that what is called `name` has."""
        found = {}
        for kind, source, others in (("tars", Tars, ".idx"), ("TFRecords", Records, (".idx", ".tar"))):
            files = [file for pattern in source.patterns(name) for file in fnmatch.filter(names, pattern)]
            if files := [file for file in files if not file.endswith(others)]:
                found[kind] = files[0]
        return found

    by_name = {name: shards(name) for name in ("train", *VALIDATION)}
    found: dict[str, str] = {}  # kind -> an example
    for examples in by_name.values():
        found = examples | found
    for split in ("train", "validation"):
        if folder := split_folder(directory, split):
            found.setdefault("class folders", f"{folder.name}/")
    found = found or shards("test")  # beside another set it is not looked at
    paths = [directory / name for name in VALIDATION if (directory / name).is_dir()]
    for both in (
        [min(by_name[name].values()) for name in VALIDATION if by_name[name]],
        [f"{path.name}/" for path in {path.resolve(): path for path in paths}.values()],  # one may link to the other
    ):
        if len(both) > 1:
            raise InputError(f"{flag}: holds {' and '.join(both)}, two sets to validate on: remove or rename one")
    prefixes = tuple(f"{name}-" for name in by_name)
    packed = [name for name in names if name.startswith(prefixes) and name.endswith(PACKED)]
    if packed and "class folders" not in found:
        raise InputError(f"{flag}: {packed[0]} is compressed: unpack it, as samples are read where they lie")
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise InputError(f"{flag}: holds {one} ({first}) and {other} ({second}): keep one kind in a directory")
    if not found:
        what = f"{flag}: no train-* files (TFRecords, or train-*.tar) and no folder train/ there"
        raise InputError(f"{what}: {instead(directory, names)}")
    return next(iter(found))


def instead(directory: Path, names: list[str]) -> str:
    """Returns what to do with a directory that holds those names and is no data set."""
    folders = [name for name in names if not name.startswith(".") and (directory / name).is_dir()]
    if below := [directory / name for name in folders if (directory / name / "train").is_dir()]:
        return f"give --data_dir={' or --data_dir='.join(map(str, below[:3]))}"
    if folders and directory.name in NAMES["train"] + NAMES["validation"]:
        return f"{folders[0]} is most likely a class, give the directory above {directory.name}/"
    if any(holds_images(directory / name) for name in folders):
        return f"if its folders are classes, {set_aside(directory, directory)}"
    if holds_images(directory):
        return "put the images of each class into a folder, as train/CLASS and val/CLASS"
    return "prepare the data set, or correct the path"


def read_dataset_json(path: Path) -> dict:
    """Returns the content of dataset.json, checked; an empty dictionary when the file does not exist."""
    try:
        declared = from_json(to_read(path).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): prepare the data set again") from None

    def wrong(what: str) -> InputError:
        return InputError(f"{path}: {what}: prepare the data set again, or correct the file")

    if not isinstance(declared, dict):
        raise wrong("is not a JSON object")
    for name, least in (("num_classes", 1), ("label_base", 0)):
        if type(declared.get(name)) is not int or not least <= declared[name] <= MOST:
            raise wrong(f"{name} must be an integer from {least} to {MOST}")
    names = declared.get("class_names")
    if names is not None and not (
        isinstance(names, list) and len(names) == declared["num_classes"] and all(isinstance(n, str) for n in names)
    ):
        raise wrong("class_names must be null or a list of num_classes strings")
    images = declared.get("images", {})
    if not (isinstance(images, dict) and all(type(n) is int for n in images.values())):
        raise wrong("images must map each split to its number of images")
    return declared
