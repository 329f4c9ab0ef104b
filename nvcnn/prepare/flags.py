"""The flags of launch/prepare.py: a dataclass for each data set, from which its command line is made."""

import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nvcnn.data.pillow import require_pillow
from nvcnn.data.tfrecord import masked_crc
from nvcnn.near_misses import check_words
from nvcnn.prepare import cifar10, fashion_mnist, folder, imagenet
from nvcnn.prepare.blueprint import Blueprint
from nvcnn.prepare.encode import Encoding
from nvcnn.prepare.formats import FORMATS
from nvcnn.prepare.verify import verify
from nvcnn.prepare.write import write_dataset
from nvcnn.program import InputError
from nvcnn.settings import Parser, add_flags, check, flag

source = partial(flag, group="sources")
image = partial(flag, group="images")
output = partial(flag, group="output")


def path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


@dataclass(frozen=True, kw_only=True)
class Output:
    """What all data sets share."""

    out: str = output(MISSING, "directory to write; a run that was stopped goes on")
    workers: int = output(len(os.sched_getaffinity(0)), "processes")
    format: str = output("tfrecord", "format of the shards, tfrecord or webdataset", choices=tuple(FORMATS))
    verify: bool = output(False, "write nothing: compare --out with its manifest")

    def __post_init__(self) -> None:
        check(self, 1 <= self.workers <= 4096, "workers", "from 1 to 4096")

    def require(self, name: str) -> None:
        if getattr(self, name) is None and not self.verify:
            raise InputError(f"{type(self).__name__.lower()} needs --{name}")

    def write(self) -> None:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Shuffled(Output):
    shards: str | None = output(
        None, "number of files, TRAIN,VAL; none: 1024,128 for imagenet, 8,2 for cifar10, one per 128 MB for folder"
    )
    seed: int = output(1, "seed of the order of the images")

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = (self.shards or "1,1").split(",")
        right = len(numbers) == 2 and all(n.isdecimal() and int(n) >= 1 for n in numbers)
        check(self, right, "shards", "two integers TRAIN,VAL of at least 1")

    def order(self) -> dict[str, Any]:
        shards = tuple(map(int, self.shards.split(","))) if self.shards else None
        return {"shards": shards, "seed": self.seed, "file_format": self.format}


@dataclass(frozen=True, kw_only=True)
class ImageFiles(Shuffled):
    train: str | None = source(None, "class folders of training images; or ImageNet's ILSVRC2012_img_train.tar")
    val: str | None = source(
        None, "class folders of validation images; or ILSVRC2012_img_val.tar, or a directory of its images"
    )
    max_side: int | None = image(None, "make larger images smaller: this many pixels at the longer side")
    quality: int = image(95, "quality of JPEGs that are encoded anew, 1 to 100")
    check: str = image(
        "structure",
        "how each image is checked: its header and end (structure), or every pixel (decode)",
        choices=("structure", "decode"),
    )
    skip_bad: bool = image(False, "leave unreadable images out, and list them in manifest.json")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("train")
        check(self, self.max_side is None or self.max_side >= 1, "max_side", "at least 1")
        check(self, 1 <= self.quality <= 100, "quality", "from 1 to 100")

    def encoding(self, *keep: str) -> Encoding:
        require_pillow()
        return Encoding(keep, self.max_side, self.quality, self.check)

    def blueprint(self) -> Blueprint:
        raise NotImplementedError

    def write(self) -> None:
        blueprint = self.blueprint()
        if "validation" not in blueprint.splits:
            how = "--val or --val_share" if isinstance(self, Folder) else "--val"
            print(
                f"without {how} there is nothing to validate on: neither eval.py nor train.py --eval_every will work",
                file=sys.stderr,
                flush=True,
            )
        write_dataset(blueprint, Path(self.out), workers=self.workers, skip_bad=self.skip_bad)


@dataclass(frozen=True, kw_only=True)
class ImageNet(ImageFiles):
    """ILSVRC2012, from its archives or class folders: 1.28 million images"""

    devkit: str | None = source(None, "ILSVRC2012_devkit_t12.tar.gz or its directory: validation labels")
    val_labels: str | None = source(None, "instead of --devkit: a synset or label from 1 per line, by image number")
    synsets: str | None = source(None, "classes by label, one per line; none: those of --train, sorted")

    def blueprint(self) -> Blueprint:
        return imagenet.blueprint(
            Path(str(self.train)),
            path(self.val),
            devkit=path(self.devkit),
            val_labels=path(self.val_labels),
            synsets=path(self.synsets),
            encoding=self.encoding("JPEG"),
            workers=self.workers,
            **self.order(),
        )


@dataclass(frozen=True, kw_only=True)
class Folder(ImageFiles):
    """class folders DIR/<class>/<images>"""

    val_share: float | None = source(None, "instead of --val: share of each class to validate on, as 0.1")

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, self.val_share is None or 0 < self.val_share < 1, "val_share", "above 0 and below 1")
        if self.val is not None and self.val_share is not None:
            raise InputError("--val and --val_share: choose one")

    def blueprint(self) -> Blueprint:
        return folder.blueprint(
            Path(str(self.train)),
            val=path(self.val),
            val_share=self.val_share,
            encoding=self.encoding("JPEG", "PNG"),
            workers=self.workers,
            **self.order(),
        )


@dataclass(frozen=True, kw_only=True)
class Cifar10(Shuffled):
    """50 000 + 10 000 images of 32 x 32 pixels, 10 classes"""

    source: str | None = source(None, "cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or their directory")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("source")

    def write(self) -> None:
        write_dataset(cifar10.blueprint(Path(str(self.source)), **self.order()), Path(self.out), workers=self.workers)


@dataclass(frozen=True, kw_only=True)
class FashionMnist(Output):
    """60 000 + 10 000 grey 28 x 28 images, 10 classes, 31 MB"""

    source: str | None = source(None, "directory of the four .gz; none: Debian's package, else a download")

    def write(self) -> None:
        fashion_mnist.fetch_and_write(Path(self.out), path(self.source), self.workers, self.format)


DATASETS: dict[str, type[Output]] = {
    "imagenet": ImageNet,
    "folder": Folder,
    "cifar10": Cifar10,
    "fashion-mnist": FashionMnist,
}


def parse(arguments: Sequence[str] | None = None) -> Output:
    """Returns the flags of a data set, or only --out and --verify. Raises InputError for a wrong command line."""
    parser = Parser(
        prog="prepare.py",
        description="Makes a data directory for --data_dir: shards, their indexes, dataset.json, manifest.json.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--verify", metavar="DIR", type=os.path.expanduser, dest="existing", help="compare DIR with its manifest"
    )
    commands = parser.add_subparsers(dest="dataset", metavar="DATASET")
    for name, flags in DATASETS.items():
        add_flags(commands.add_parser(name, help=flags.__doc__, description=flags.__doc__, allow_abbrev=False), flags)
    arguments = sys.argv[1:] if arguments is None else arguments
    if named := next((word for word in arguments if word in DATASETS), None):
        check_words(DATASETS[named], arguments[arguments.index(named) + 1 :])
    given = vars(parser.parse_args(arguments))
    existing, dataset = given.pop("existing"), given.pop("dataset")
    if existing is not None:
        return Output(out=existing, verify=True)
    if dataset is None:
        raise InputError(f"name the data set: {', '.join(DATASETS)}; or --verify=DIR")
    return DATASETS[dataset](**given)


def prepare(flags: Output) -> None:
    """Writes the data set, or verifies it. Raises InputError for what is wrong with its sources or with --out."""
    if flags.verify:
        return verify(Path(flags.out), flags.workers)
    for name in ("train", "val", "source"):
        given = getattr(flags, name, None)
        if given and Path(flags.out).resolve().is_relative_to(Path(given).resolve()):
            raise InputError(f"--out={flags.out}: is inside --{name}={given}: give a directory outside it")
    if flags.format == "tfrecord":
        masked_crc(b"")  # if it is not installed, that is reported now
    return flags.write()
