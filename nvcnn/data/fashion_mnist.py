"""Fashion-MNIST as TFRecords: 60 000 training and 10 000 test images, 28 x 28 grey, 10 classes (MIT licence).

Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747; https://github.com/zalandoresearch/fashion-mnist
"""

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

from nvcnn.data.tfrecord import atomic_writer, encode_example, index_path, write_shard
from nvcnn.errors import InputError

CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
SPLITS = {"train": ("train", 8), "validation": ("t10k", 2)}  # our name -> theirs, shards
LABEL_BASE = 1  # of ImageNet's TFRecords, where 0 is the background

# SHA-256 of the uncompressed content, because Debian compresses anew. Debian's bytes with the original's gzip header
# (file name and time) put back have the MD5s that the data set's README publishes.
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
INSTALLED = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts the files
PACKAGE = "dataset-fashion-mnist"
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"


def read_idx(directory: Path, name: str) -> bytes:
    """The uncompressed content of `name`.gz. Raises InputError when it is absent, unreadable or another data set's."""
    path = directory / f"{name}.gz"
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}): give a directory with Fashion-MNIST's four .gz") from None
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        raise InputError(f"{path}: is not Fashion-MNIST's (its SHA-256 differs): get the file again")
    return data


def parse_idx(images: bytes, labels: bytes) -> tuple[list[bytes], list[int], int, int]:
    """Pixels of each image, labels, height, width. IDX is a big-endian header and then the raw values."""
    _, n, height, width = struct.unpack(">4I", images[:16])
    size = height * width
    return [images[16 + i * size : 16 + (i + 1) * size] for i in range(n)], list(labels[8:]), height, width


def png(pixels: bytes, height: int, width: int) -> bytes:
    """An 8-bit grey PNG without filters (ISO/IEC 15948): the same bytes wherever zlib is the same."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + pixels[y * width : (y + 1) * width] for y in range(height))
    header = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def _write(path: Path, images: list[bytes], labels: list[int], height: int, width: int) -> int:
    """One shard, in a process of its own."""
    write_shard(
        path,
        (
            encode_example(
                {
                    "image/encoded": [png(pixels, height, width)],
                    "image/class/label": [label + LABEL_BASE],
                    "image/class/text": [CLASS_NAMES[label].encode()],
                    **{f"image/object/bbox/{side}": [] for side in ("xmin", "ymin", "xmax", "ymax")},
                }
            )
            for pixels, label in zip(images, labels, strict=True)
        ),
    )
    return len(images)


def _from_debian(directory: Path) -> Path:
    """Downloads and unpacks Debian's package, which needs no root. Raises OSError saying what failed."""
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
            (directory / f"{name}.gz").write_bytes(response.read())
    return directory


def read_source(source: Path | None) -> dict[str, bytes]:
    """The four files from `source`, else Debian's installed package, else its download, else the public download."""
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
    raise InputError(f"Fashion-MNIST cannot be had ({'; '.join(failures)}): give its four .gz files with --source")


@contextmanager
def _progress(images: int) -> Iterator[Callable[[int, Path], object]]:
    """A bar on a terminal with tqdm, else a line per shard."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None  # type: ignore[assignment, misc]
    if tqdm is not None and sys.stderr.isatty():
        with tqdm(total=images, unit="image", dynamic_ncols=True) as bar:
            yield lambda n, path: bar.update(n)
    else:
        yield lambda n, path: print(f"{path.name}: {n} images", flush=True)


def _check_out(out: Path, expected: Iterable[Path]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out={out}: cannot be made ({error.strerror})") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise InputError(f"--out={out}: is not writable")
    for path in sorted(out.iterdir()):
        if path.name.startswith(".") and path.name.endswith(".tmp"):
            path.unlink(missing_ok=True)  # of a run that was killed
        elif path not in expected:
            raise InputError(f"--out={out}: holds {path.name}, which is not of this data set: give an empty directory")


def prepare(out: Path, source: Path | None = None, workers: int = 1) -> None:
    """Writes train-0000?-of-00008, validation-0000?-of-00002, their indexes, and dataset.json last.

    Shards that are there are kept, so an interrupted run goes on where it stopped; a complete directory costs nothing.
    The same bytes every time. Raises InputError for an unusable `out` or `source`.
    """
    shards = {
        split: [out / f"{split}-{i:05d}-of-{count:05d}" for i in range(count)] for split, (_, count) in SPLITS.items()
    }
    paths = [path for split in shards.values() for path in split]
    summary = out / "dataset.json"
    files = {summary, *paths, *map(index_path, paths)}
    _check_out(out, files)
    if all(path.exists() for path in files):
        print(f"Fashion-MNIST in {out} is complete")
        return

    idx = read_source(source)
    images = {}
    tasks = []
    for split, (prefix, count) in SPLITS.items():
        pixels, labels, height, width = parse_idx(
            idx[f"{prefix}-images-idx3-ubyte"], idx[f"{prefix}-labels-idx1-ubyte"]
        )
        order = list(range(len(pixels)))
        random.Random(f"Fashion-MNIST {split}").shuffle(order)
        images[split] = len(order)
        for i, path in enumerate(shards[split]):
            part = order[len(order) * i // count : len(order) * (i + 1) // count]
            if not (path.exists() and index_path(path).exists()):
                tasks.append((path, [pixels[j] for j in part], [labels[j] for j in part], height, width))

    # A worker leaves Ctrl-C to this process and finishes its shard.
    pool = ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        with _progress(sum(len(task[1]) for task in tasks)) as update:
            pending = {pool.submit(_write, *task): task[0] for task in tasks}
            for done in as_completed(pending):
                update(done.result(), pending[done])
        with atomic_writer(summary) as file:
            text = {
                "num_classes": len(CLASS_NAMES),
                "label_base": LABEL_BASE,
                "class_names": CLASS_NAMES,
                "images": images,
            }
            file.write((json.dumps(text, indent=2) + "\n").encode())
    except OSError as error:
        raise InputError(
            f"--out={out}: {error.strerror}: make room or give another directory, then run again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    print(f"Fashion-MNIST in {out}: {', '.join(f'{n} {split} images' for split, n in images.items())}")
