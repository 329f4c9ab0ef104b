"""CIFAR-10: 50 000 training and 10 000 test images, 32 x 32 RGB, 10 classes.

Krizhevsky 2009; https://www.cs.toronto.edu/~kriz/cifar.html has both archives that are read here. In the Python
version a batch is a pickled dictionary of b"data" (N, 3072) uint8 and b"labels"; in the binary version a batch is
records of 1 byte label and 3072 bytes of pixels. Pixels are planar: 1024 red, 1024 green, 1024 blue.
"""

import io
import pickle
from pathlib import Path
from typing import Any

from nvcnn.data.archives import content, opened
from nvcnn.prepare.blueprint import Blueprint, Sample
from nvcnn.prepare.encode import png
from nvcnn.program import InputError

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "validation": ["test_batch"]}
DIRECTORIES = ("", "cifar-10-batches-py", "cifar-10-batches-bin")
SHARDS = (8, 2)
SIDE = 32  # pixels
PIXELS = 3 * SIDE * SIDE  # bytes of an image
ARRAYS = {  # what a pickled one names; numpy 1 and 2 have it at two places
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
}
LARGEST = 1 << 25  # bytes of a batch, which has 31 million


class Pickled:
    """Stands for an array or a dtype: what makes it, and its state. At a wrong state numpy's own may crash."""

    def __init__(self, *made_of: Any):
        self.made_of, self.state = made_of, ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state


class ArrayUnpickler(pickle._Unpickler):
    """Lets a pickle call only what stands for an array, so that a downloaded file cannot run code.

    In Python, because the one in C takes 64 GB for a place in its memo that a few bytes name. Without bytearrays, which
    no such file has: they are made as large as it says before they are read.
    """

    dispatch = pickle._Unpickler.dispatch.copy()
    del dispatch[pickle.BYTEARRAY8[0]]

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="bytes")
        self.encoded: dict[str, bytes] = {}

    def latin1(self, text: str, _: str) -> bytes:
        """Returns the bytes that Python 3 writes as a text in protocols without bytes; the same ones for the same."""
        if text not in self.encoded:
            self.encoded[text] = text.encode("latin1")
        return self.encoded[text]

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self.latin1
        if (module, name) in ARRAYS:
            return Pickled
        raise pickle.UnpicklingError(f"wants {module}.{name}")


def read_batches(source: Path) -> dict[str, bytes]:
    """Returns the content of each batch by file name. Raises InputError if `source` is unreadable or lacks one."""
    wanted = {f"{name}{suffix}" for names in BATCHES.values() for name in names for suffix in ("", ".bin")}
    found: dict[str, bytes] = {}
    what = f"--source={source}"
    again = "give CIFAR-10's archive, cifar-10-python.tar.gz or cifar-10-binary.tar.gz, or the directory it unpacks to"
    if source.is_dir():
        try:
            for directory in DIRECTORIES:
                found |= {
                    name: (source / directory / name).read_bytes()
                    for name in wanted
                    if (source / directory / name).is_file()
                }
        except OSError as error:
            raise InputError(f"{what}: cannot be read ({error.strerror}): {again}") from None
    else:
        with opened(source, what, again, compressed=True) as archive:
            for member in archive:
                name = Path(member.name).name
                if name in wanted:
                    found[name] = content(archive, member, LARGEST)
    for suffix in ("", ".bin"):
        names = [f"{name}{suffix}" for batches in BATCHES.values() for name in batches]
        if all(name in found for name in names):
            return {name: found[name] for name in names}
    raise InputError(f"{what}: holds no data_batch_1 to 5 and test_batch: give CIFAR-10's archive")


def parse_batch(name: str, data: bytes) -> list[tuple[bytes, int]]:
    """Returns planar pixels and label of each image. Raises ValueError, or what pickle raises on damaged data."""
    if name.endswith(".bin"):
        if not data or len(data) % (PIXELS + 1):
            raise ValueError(f"{len(data)} bytes are not images of {PIXELS + 1}")
        return [(data[at + 1 : at + 1 + PIXELS], data[at]) for at in range(0, len(data), PIXELS + 1)]
    batch = ArrayUnpickler(data).load()
    labels = batch[b"labels"]
    _, _, dtype, by_columns, pixels = batch[b"data"].state  # what numpy.ndarray.__setstate__ takes
    if dtype.made_of[0] not in ("u1", b"u1") or by_columns:
        raise ValueError("its pixels are not bytes, row by row")
    if len(pixels) != PIXELS * len(labels):
        raise ValueError(f"{len(labels)} labels, but {len(pixels)} bytes of pixels")
    return [(pixels[i * PIXELS : (i + 1) * PIXELS], int(label)) for i, label in enumerate(labels)]


def encode(sample: Sample) -> tuple[bytes, bool]:
    assert isinstance(sample.source, bytes)
    plane = SIDE * SIDE
    interleaved = bytearray(PIXELS)
    for channel in range(3):
        interleaved[channel::3] = sample.source[channel * plane : (channel + 1) * plane]
    return png(bytes(interleaved), SIDE, SIDE, channels=3), False


def blueprint(
    source: Path, *, shards: tuple[int, int] = (8, 2), seed: int = 1, file_format: str = "tfrecord"
) -> Blueprint:
    """Raises InputError for a `source` that is not CIFAR-10."""
    batches = read_batches(source)
    splits = {}
    for split, stems in BATCHES.items():
        splits[split] = [
            Sample(f"{name} image {i}", label, pixels)
            for name in batches
            if name.removesuffix(".bin") in stems
            for i, (pixels, label) in enumerate(checked_batch(source, name, batches[name]))
        ]
    return Blueprint(
        "CIFAR-10",
        CLASS_NAMES,
        splits,
        dict(zip(splits, shards or SHARDS, strict=True)),
        encode,
        order=str(seed),
        file_format=file_format,
        flags={"seed": seed},
    )


def checked_batch(source: Path, name: str, data: bytes) -> list[tuple[bytes, int]]:
    try:
        batch = parse_batch(name, data)
    except Exception as error:  # damaged pickles raise whatever they stumble over
        raise InputError(
            f"--source={source}: {name} is not a batch of CIFAR-10 ({error}): get the archive again"
        ) from None
    if wrong := [label for _, label in batch if not 0 <= label < len(CLASS_NAMES)]:
        raise InputError(
            f"--source={source}: {name} has label {wrong[0]}, which CIFAR-10 does not have: get the archive again"
        )
    return batch
