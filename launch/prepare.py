"""Makes a data directory for --data_dir: python launch/prepare.py imagenet|folder|cifar10|fashion-mnist --out DIR"""

import argparse
import os
import signal
import sys
from argparse import ArgumentTypeError
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvcnn.data import cifar10, fashion_mnist, folder, imagenet
from nvcnn.data.images import Encoding
from nvcnn.data.pillow import require_pillow
from nvcnn.data.plan import LABEL_BASE
from nvcnn.data.prepare import prepare
from nvcnn.data.tfrecord import masked_crc
from nvcnn.data.verify import verify
from nvcnn.program import SAVED_AND_STOPPED, InputError, run
from nvcnn.settings import Parser

CORES = len(os.sched_getaffinity(0))  # that this process may use
DATASETS = ("imagenet", "folder", "cifar10", "fashion-mnist")


def positive(text: str) -> int:
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    raise ArgumentTypeError(f"{text!r} is no number from 1")


def quality(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 100:
        return int(text)
    raise ArgumentTypeError(f"{text!r} is no number from 1 to 100")


def share(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < 1:
            return float(text)
    raise ArgumentTypeError(f"{text!r} is no number between 0 and 1")


def shards(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if len(numbers) != 2:
        raise ArgumentTypeError(f"{text!r} is not two numbers, TRAIN,VAL")
    return tuple(map(positive, numbers))


def add_command(commands, name: str, help: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
    add = command.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="directory to write; a run that was stopped goes on")
    add("--workers", type=positive, default=CORES, metavar="N", help="processes")
    add("--format", choices=tuple(LABEL_BASE), default="tfrecord", help="of the shards (default tfrecord)")
    add("--verify", action="store_true", help="write nothing: compare --out with its manifest")
    return command


def add_shuffling(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument("--shards", type=shards, metavar="TRAIN,VAL", help=f"number of files (default {default})")
    command.add_argument("--seed", type=int, default=1, metavar="N", help="of the order of the images (default 1)")


def add_images(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--max_side", type=positive, metavar="N", help="make larger images smaller: N pixels at the longer side")
    add("--quality", type=quality, default=95, metavar="Q", help="of JPEGs that are encoded anew (default 95)")
    add(
        "--check",
        choices=("structure", "decode"),
        default="structure",
        help="of each image: header and end, or every pixel (default structure)",
    )
    add("--skip_bad", action="store_true", help="leave unreadable images out, and list them in manifest.json")


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="prepare.py",
        description="Makes a data directory for --data_dir: shards, their indexes, dataset.json, manifest.json.",
        allow_abbrev=False,
    )
    parser.add_argument("--verify", type=Path, metavar="DIR", dest="existing", help="compare DIR with its manifest")
    commands = parser.add_subparsers(dest="dataset", metavar="DATASET")

    command = add_command(commands, "imagenet", "ILSVRC2012, from its archives or class folders: 1.28 million images")
    command.add_argument(
        "--train", type=Path, metavar="PATH", help="ILSVRC2012_img_train.tar as downloaded, or class folders n*/"
    )
    command.add_argument(
        "--val", type=Path, metavar="PATH", help="ILSVRC2012_img_val.tar, a directory of its images, or class folders"
    )
    command.add_argument(
        "--devkit", type=Path, metavar="PATH", help="ILSVRC2012_devkit_t12.tar.gz or its directory: validation labels"
    )
    command.add_argument(
        "--val_labels", type=Path, metavar="PATH", help="instead: a synset or label from 1 per line, by file name"
    )
    command.add_argument(
        "--synsets",
        type=Path,
        metavar="PATH",
        help="classes by label, one per line (default: those of --train, sorted)",
    )
    add_shuffling(command, "1024,128")
    add_images(command)

    command = add_command(commands, "folder", "class folders DIR/<class>/<images>")
    command.add_argument("--train", type=Path, metavar="PATH", help="directory of class folders")
    validation = command.add_mutually_exclusive_group()
    validation.add_argument("--val", type=Path, metavar="PATH", help="class folders of validation images")
    validation.add_argument("--val_share", type=share, metavar="F", help="share of each class to validate on, as 0.1")
    add_shuffling(command, "one per 128 MB")
    add_images(command)

    command = add_command(commands, "cifar10", "50 000 + 10 000 images of 32 x 32 pixels, 10 classes")
    command.add_argument(
        "--source", type=Path, metavar="PATH", help="cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or their directory"
    )
    add_shuffling(command, "8,2")

    command = add_command(commands, "fashion-mnist", "60 000 + 10 000 grey 28 x 28 images, 10 classes, 31 MB")
    command.add_argument(
        "--source", type=Path, metavar="PATH", help="directory of the four .gz; none: Debian's package, else a download"
    )

    return parser


def make(flags: argparse.Namespace) -> None:
    if flags.existing is not None:
        return verify(flags.existing, CORES)
    if flags.dataset is None:
        raise InputError(f"name the data set: {', '.join(DATASETS)}; or --verify=DIR")
    if flags.verify:
        return verify(flags.out, flags.workers)
    if flags.format == "tfrecord":
        masked_crc(b"")  # if it cannot be had, that is said now
    if flags.dataset == "fashion-mnist":
        return fashion_mnist.prepare(flags.out, flags.source, flags.workers, flags.format)
    for name in ("train", "source"):
        if name in flags and getattr(flags, name) is None:
            raise InputError(f"{flags.dataset} needs --{name}")
    for name in ("train", "val", "source"):
        if (source := getattr(flags, name, None)) and flags.out.resolve().is_relative_to(source.resolve()):
            raise InputError(f"--out={flags.out}: is inside --{name}={source}: give a directory outside it")
    order: dict[str, Any] = {"seed": flags.seed, "file_format": flags.format} | (
        {"shards": flags.shards} if flags.shards else {}
    )
    if flags.dataset == "cifar10":
        return prepare(cifar10.plan(flags.source, **order), flags.out, workers=flags.workers)
    require_pillow()
    keep = ("JPEG",) if flags.dataset == "imagenet" else ("JPEG", "PNG")
    encoding = Encoding(keep, flags.max_side, flags.quality, flags.check)
    if flags.dataset == "imagenet":
        labels = {"devkit": flags.devkit, "val_labels": flags.val_labels, "synsets": flags.synsets}
        plan = imagenet.plan(flags.train, flags.val, **labels, encoding=encoding, workers=flags.workers, **order)
    else:
        shares = {"val": flags.val, "val_share": flags.val_share}
        plan = folder.plan(flags.train, **shares, encoding=encoding, workers=flags.workers, **order)
    return prepare(plan, flags.out, workers=flags.workers, skip_bad=flags.skip_bad)


def main(arguments: list[str] | None = None) -> int:
    flags = parser().parse_args(arguments)
    try:
        make(flags)
    except KeyboardInterrupt:
        again = "" if flags.existing or flags.verify else "; the same command goes on from here"
        print(f"prepare.py: stopped{again}", file=sys.stderr)
        return SAVED_AND_STOPPED
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    run(main)
