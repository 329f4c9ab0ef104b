"""A data directory: TFRecord shards, their indexes, and what the labels mean."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from nvcnn.data.tfrecord import decode_example, index_path, read_records, scan, write_index
from nvcnn.errors import InputError

IMAGE, LABEL = "image/encoded", "image/class/label"


@dataclass(frozen=True)
class Dataset:
    """Files `<split>-*` of TFRecords in `directory`, each with an index; labels label_base .. label_base + classes."""

    directory: Path
    num_classes: int
    label_base: int
    class_names: tuple[str, ...] | None

    def shards(self, split: str) -> list[Path]:
        """The files of a split, in order of name. Raises InputError when there are none."""
        shards = sorted(p for p in self.directory.glob(f"{split}-*") if p.suffix != ".idx" and p.is_file())
        if not shards:
            raise InputError(
                f"--data_dir={self.directory}: no {split}-* files: prepare the data set, or correct the path"
            )
        return shards

    def images(self, split: str) -> int:
        """Records of a split, counted in its indexes."""
        return sum(index_path(shard).read_bytes().count(b"\n") for shard in self.shards(split))

    def zero_based(self, label: int) -> int:
        """The class of a record's label. Raises InputError when the label is outside the classes."""
        if not 0 <= label - self.label_base < self.num_classes:
            last = self.label_base + self.num_classes - 1
            raise InputError(
                f"--data_dir={self.directory}: label {label} is outside {self.label_base} .. {last}: "
                "set --num_classes and --label_base to those of the data"
            )
        return label - self.label_base


def find_dataset(data_dir: str | Path, *, num_classes: int | None, label_base: int | None, split: str) -> Dataset:
    """The data set in `data_dir`, its `split` checked: shards, indexes (missing ones are built), first labels.

    What the labels mean comes from dataset.json; without it from `num_classes` and `label_base`, else 1000 and 1.
    Raises InputError for anything that training would stumble over later.
    """
    directory = Path(data_dir)
    flag = f"--data_dir={data_dir}"
    try:
        empty = not any(directory.iterdir())
    except OSError as error:
        raise InputError(f"{flag}: {error.strerror}: prepare a data set there, or correct the path") from None
    if empty:
        raise InputError(f"{flag}: is empty: prepare a data set there, or correct the path")

    declared = read_dataset_json(directory / "dataset.json")
    for name, value in (("num_classes", num_classes), ("label_base", label_base)):
        if value is not None and value != declared.get(name, value):
            raise InputError(f"--{name}={value}: {directory}/dataset.json says {declared[name]}: leave the flag out")
    names = declared.get("class_names")
    dataset = Dataset(
        directory,
        declared.get("num_classes", 1000 if num_classes is None else num_classes),
        declared.get("label_base", 1 if label_base is None else label_base),
        None if names is None else tuple(names),
    )
    try:
        for shard in dataset.shards(split):
            check_index(shard)
            check_first_record(dataset, shard)
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})") from None
    images, promised = dataset.images(split), declared.get("images", {}).get(split)
    if images == 0:
        raise InputError(f"{flag}: its {split}-* files hold no images: prepare the data set again")
    if promised not in (None, images):
        raise InputError(
            f"{flag}: {images} {split} images, but dataset.json says {promised}: a shard is missing, or extra"
        )
    return dataset


def read_dataset_json(path: Path) -> dict:
    """The content of dataset.json, checked; empty when there is none."""
    try:
        declared = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): prepare the data set again") from None

    def wrong(what: str) -> InputError:
        return InputError(f"{path}: {what}: prepare the data set again, or correct the file")

    if not isinstance(declared, dict):
        raise wrong("is not a JSON object")
    for name, least in (("num_classes", 1), ("label_base", 0)):
        if type(declared.get(name)) is not int or declared[name] < least:
            raise wrong(f"{name} must be an integer, at least {least}")
    names = declared.get("class_names")
    if names is not None and not (
        isinstance(names, list) and len(names) == declared["num_classes"] and all(isinstance(n, str) for n in names)
    ):
        raise wrong("class_names must be null or a list of num_classes strings")
    images = declared.get("images", {})
    if not (isinstance(images, dict) and all(type(n) is int for n in images.values())):
        raise wrong("images must map each split to its number of images")
    return declared


def check_index(shard: Path) -> None:
    """Builds the shard's index if it has none; raises InputError if it is not that of this shard."""
    index = index_path(shard)
    if not index.exists():
        print(f"{shard}: no index, building it", file=sys.stderr, flush=True)
        records = list(scan(shard))
        try:
            write_index(shard, records)
        except OSError as error:
            raise InputError(
                f"{index}: is missing and cannot be written ({error.strerror}): make {shard.parent} writable once"
            ) from None
    text = index.read_bytes()
    size = shard.stat().st_size
    if not re.fullmatch(rb"(\d+ \d+\n)*", text):
        raise InputError(f"{index}: is not an index of lines 'offset size': delete it, it is built anew")
    end = sum(map(int, text[text[:-1].rfind(b"\n") + 1 :].split()))
    if end != size:
        raise InputError(
            f"{index}: ends at byte {end}, but {shard} has {size} bytes: the shard is truncated (copy it again) "
            "or the index is of another file (delete it, it is built anew)"
        )


def check_first_record(dataset: Dataset, shard: Path) -> None:
    """Finds wrong files and wrong label ranges before training starts."""
    data = next(read_records(shard), None)
    if data is None:
        return
    try:
        example = decode_example(data)
    except ValueError as error:
        raise InputError(f"{shard}: its first record is {error}: prepare the data set again") from None
    for name in (IMAGE, LABEL):
        if len(example.get(name, ())) != 1:
            raise InputError(f"{shard}: its first record has no {name}: prepare the data set again")
    dataset.zero_based(example[LABEL][0])
