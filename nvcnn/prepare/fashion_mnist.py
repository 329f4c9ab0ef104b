"""Fashion-MNIST: 60 000 training and 10 000 test images, 28 x 28 grey, 10 classes (MIT licence).

Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747; https://github.com/zalandoresearch/fashion-mnist
"""

import gzip
import hashlib
import shutil
import struct
import subprocess
import tempfile
import urllib.request
import zlib
from http.client import HTTPException
from pathlib import Path

from nvcnn.files import to_read
from nvcnn.prepare.blueprint import Blueprint, Sample
from nvcnn.prepare.encode import png
from nvcnn.prepare.manifest import is_complete
from nvcnn.prepare.write import check_out, write_dataset
from nvcnn.program import InputError

CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
TITLE = "Fashion-MNIST"
SIDE = 28  # pixels
SPLITS = {"train": ("train", 8), "validation": ("t10k", 2)}  # our name -> theirs, shards

# SHA-256 of the uncompressed content, because Debian compresses anew. Debian's bytes with the original's gzip header
# (file name and time) put back have the MD5s that the data set's README publishes.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
LARGEST = 1 << 26  # bytes of a file, of which the largest has 47 million
INSTALLED = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts the files
PACKAGE = "dataset-fashion-mnist"
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"


def read_idx(directory: Path, name: str) -> bytes:
    """Returns the content of `name`.gz, uncompressed. Raises InputError if it is unreadable or something else."""
    path = directory / f"{name}.gz"
    try:
        with gzip.open(to_read(path)) as file:
            data = file.read(LARGEST)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({why}): give a directory with Fashion-MNIST's four .gz") from None
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        raise InputError(f"{path}: is not Fashion-MNIST's (its SHA-256 differs): get the file again")
    return data


def parse_idx(images: bytes, labels: bytes) -> tuple[list[bytes], list[int]]:
    """Returns the pixels of each image, and the labels. IDX is a big-endian header and then the raw values."""
    _, n, height, width = struct.unpack(">4I", images[:16])
    size = height * width
    return [images[16 + i * size : 16 + (i + 1) * size] for i in range(n)], list(labels[8:])


def encode(sample: Sample) -> tuple[bytes, bool]:
    assert isinstance(sample.source, bytes)
    return png(sample.source, SIDE, SIDE), False


def _from_debian(directory: Path) -> Path:
    """Downloads and unpacks Debian's package, without root. Returns where it is. Raises OSError if that fails."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise OSError("no apt-get here")

    def run(*command: str) -> None:
        result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=600)
        if result.returncode:
            raise OSError(next(iter(result.stderr.strip().splitlines()[::-1]), f"exit code {result.returncode}"))

    try:
        run("apt-get", "download", PACKAGE)
    except OSError:  # perhaps this machine has no package lists: fetch them, to where we may write
        (directory / "lists/partial").mkdir(parents=True)
        private = [f"-oDir::State::Lists={directory}/lists", f"-oDir::Cache={directory}", "-oDebug::NoLocking=1"]
        run("apt-get", *private, "update")
        run("apt-get", *private, "download", PACKAGE)
    run("dpkg", "-x", next(directory.glob("*.deb")).name, ".")
    return directory / INSTALLED.relative_to("/")


def _from_internet(directory: Path) -> Path:
    for name in SHA256:
        with urllib.request.urlopen(f"{ADDRESS}/{name}.gz", timeout=60) as response:
            (directory / f"{name}.gz").write_bytes(response.read(LARGEST))
    return directory


def read_source(source: Path | None) -> dict[str, bytes]:
    """Returns the four files of `source`, else of Debian's package, installed or downloaded, else of the original."""
    if source is None and INSTALLED.is_dir():
        source = INSTALLED
    if source is not None:
        print(f"Fashion-MNIST: from {source}", flush=True)
        return {name: read_idx(source, name) for name in SHA256}
    failures = []
    for what, fetch in ((f"Debian's package {PACKAGE}", _from_debian), (ADDRESS, _from_internet)):
        print(f"Fashion-MNIST: downloading {what} (31 MB)", flush=True)
        with tempfile.TemporaryDirectory() as directory:
            try:
                found = fetch(Path(directory))
            except (OSError, HTTPException, subprocess.TimeoutExpired) as error:
                failures.append(f"{what}: {error}")
                continue
            return {name: read_idx(found, name) for name in SHA256}
    raise InputError(
        f"Fashion-MNIST cannot be downloaded ({'; '.join(failures)}): give its four .gz files with --source"
    )


def fetch_and_write(out: Path, source: Path | None = None, workers: int = 1, file_format: str = "tfrecord") -> None:
    """Writes the data set to `out` unless it is complete there. Raises InputError for an unusable `out` or `source`."""
    shards = {split: n for split, (_, n) in SPLITS.items()}
    check_out(out, shards, file_format)  # before anything is downloaded
    if is_complete(out, TITLE, file_format):
        return
    idx = read_source(source)
    splits = {}
    for split, (prefix, _) in SPLITS.items():
        images, labels = parse_idx(idx[f"{prefix}-images-idx3-ubyte"], idx[f"{prefix}-labels-idx1-ubyte"])
        splits[split] = [
            Sample(f"{prefix} image {i}", label, image)
            for i, (image, label) in enumerate(zip(images, labels, strict=True))
        ]
    blueprint = Blueprint(TITLE, CLASS_NAMES, splits, shards, encode, order=TITLE, file_format=file_format)
    write_dataset(blueprint, out, workers=workers)
