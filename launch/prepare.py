"""Makes a data directory for --data_dir: python launch/prepare.py fashion-mnist --out DIR"""

import os
import sys
from pathlib import Path

from nvcnn.data import fashion_mnist
from nvcnn.program import SAVED_AND_STOPPED, run
from nvcnn.settings import Parser


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="prepare.py", description="Makes a data directory for --data_dir: TFRecords, indexes, classes."
    )
    commands = parser.add_subparsers(dest="dataset", required=True)
    command = commands.add_parser("fashion-mnist", help="60 000 + 10 000 grey 28 x 28 images, 10 classes, 31 MB")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    command.add_argument(
        "--source", type=Path, metavar="DIR", help="the four .gz files; none: Debian's package, else a download"
    )
    command.add_argument("--workers", type=positive, default=os.cpu_count(), metavar="N", help="processes")
    flags = parser.parse_args(arguments)
    try:
        fashion_mnist.prepare(flags.out, flags.source, flags.workers)
    except KeyboardInterrupt:
        print("prepare.py: stopped; the same command goes on from here", file=sys.stderr)
        return SAVED_AND_STOPPED
    return 0


if __name__ == "__main__":
    run(main)
