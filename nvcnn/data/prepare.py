"""Makes a data directory: shuffled shards, their indexes, dataset.json, and manifest.json last.

A data set is a `Plan`: where its images are, and what becomes of each. Shards are written by a pool of processes, each
complete or not at all, so a run that was killed goes on where it stopped; what a shard holds depends on the plan alone.
"""

import fcntl
import gc
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from ctypes import CDLL
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nvcnn.data.dataset import read_dataset_json
from nvcnn.data.images import UnreadableImage
from nvcnn.data.tfrecord import (
    atomic_writer,
    encode_example,
    index_path,
    index_text,
    read_records,
    write_record,
)
from nvcnn.errors import InputError

LABEL_BASE = {
    "tfrecord": 1,
    "webdataset": 0,
}  # as ImageNet's TFRecords, where 0 is the background, and its tars have it
SUFFIX = {"tfrecord": "", "webdataset": ".tar"}
UNFINISHED = ".unfinished"  # directory in --out: the flags of a run, and a part of the manifest for each finished shard
SUMMARIES = ("dataset.json", "manifest.json")
COUNTED = ("encoded_anew", "bad")  # of a shard, in the manifest
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOCK_WAIT = 10.0  # seconds for the workers of a killed run to end


class Sample(NamedTuple):
    """An image. Some 250 bytes each, and all that is kept of a data set in memory.

    name: in messages, and below a directory its path. label: zero-based.
    source: the tar that holds it; the directory it is in; or the pixels themselves.
    offset, size: bytes in the tar. offset 0: a file of its own.
    """

    name: str
    label: int
    source: str | bytes
    offset: int = 0
    size: int = 0


@dataclass(frozen=True)
class Plan:
    """A data set to make.

    splits: the images, in an order that the sources alone decide. shards: files of each split.
    encode: what a worker stores of a sample, and whether that was encoded anew; raises UnreadableImage.
    order: decides the shuffling. flags: those that decide bytes; a run goes on under the same ones only.
    files: name and text of files beside the shards.
    """

    title: str
    class_names: tuple[str, ...]
    splits: Mapping[str, list[Sample]]
    shards: Mapping[str, int]
    encode: Callable[[Sample], tuple[bytes, bool]]
    order: str
    file_format: str = "tfrecord"
    flags: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What two runs in one directory must share, in JSON's own types."""
        names = hashlib.sha256("\n".join(self.class_names).encode(errors="surrogateescape")).hexdigest()
        shards = ",".join(map(str, self.shards.values()))
        given = {name: value for name, value in self.flags.items() if value is not None}
        return {"dataset": self.title, "format": self.file_format, "shards": shards, **given, "classes": names}


def prepare(plan: Plan, out: Path, *, workers: int = 1, skip_bad: bool = False) -> None:
    """Makes the data directory `out`, or what is missing of it; the same bytes each time, for any `workers`.

    Raises InputError for an unusable `out`, one that was begun otherwise, and, once everything has been read, for
    unreadable images. With `skip_bad` those are left out instead, and listed in the manifest.
    """
    for split, n in plan.shards.items():
        if n > len(plan.splits[split]):
            raise InputError(f"--shards: {n} {split} shards, but {len(plan.splits[split])} {split} images: give fewer")
    check_out(out, plan.shards, plan.file_format, plan.files)
    shards = shard_paths(out, plan.shards, plan.file_format)
    paths = [path for split in shards.values() for path in split]
    beside = [out / name for name in (*plan.files, *SUMMARIES)]
    with locked(out):
        finished = begun(plan, out)
        parts, tasks = {}, {}
        for split, samples in plan.splits.items():
            order = list(range(len(samples)))
            random.Random(f"{plan.order} {split}").shuffle(order)
            for i, path in enumerate(shards[split]):
                first, last = (len(order) * k // len(shards[split]) for k in (i, i + 1))
                here = [samples[j] for j in order[first:last]]
                part = finished.get(path.name)
                if part is not None and part["source"] != digest(here):
                    raise InputError(
                        f"--out={out}: {path.name} was made from other images: give the sources it was begun with, "
                        "or another directory"
                    )
                if part is not None and is_there(path, part):
                    parts[path.name] = part
                else:
                    tasks[path] = (first, here)
        if not tasks and all(path.exists() for path in beside):
            shutil.rmtree(out / UNFINISHED, ignore_errors=True)
            print(f"{plan.title} in {out} is complete")
            return
        try:
            parts |= write_shards(plan, out, tasks, workers, skip_bad)
            parts = {path.name: parts[path.name] for path in paths}
            images = {split: sum(parts[path.name]["images"] for path in shards[split]) for split in shards}
            finish(plan, out, parts, images)
        except OSError as error:
            raise InputError(
                f"--out={out}: {error.strerror}: make room or give another directory, then run again"
            ) from None
    encoded, bad = (sum(n if type(n := part[what]) is int else len(n) for part in parts.values()) for what in COUNTED)
    counts = [f"{n} {split} images" for split, n in images.items()]
    counts += [f"{encoded} encoded anew"] * (encoded > 0) + [f"{bad} unreadable left out"] * (bad > 0)
    print(f"{plan.title} in {out}: {', '.join(counts)}")


def shard_paths(out: Path, shards: Mapping[str, int], file_format: str) -> dict[str, list[Path]]:
    """The files of each split."""
    suffix = SUFFIX[file_format]
    return {split: [out / f"{split}-{i:05d}-of-{n:05d}{suffix}" for i in range(n)] for split, n in shards.items()}


def check_out(out: Path, shards: Mapping[str, int], file_format: str, files: Iterable[str] = ()) -> None:
    """Makes the directory. Raises InputError when it cannot be written, or holds anything but such a data set."""
    expected = {path for paths in shard_paths(out, shards, file_format).values() for path in paths}
    expected |= {*map(index_path, expected), *(out / name for name in (*files, *SUMMARIES, UNFINISHED))}
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out={out}: cannot be made ({error.strerror})") from None
    if not os.access(out, os.W_OK | os.X_OK):
        raise InputError(f"--out={out}: is not writable")
    for path in sorted(out.iterdir()):
        if path not in expected and not is_temporary(path):
            raise InputError(
                f"--out={out}: holds {path.name}, which is not of this data set: give an empty directory, "
                "or the flags it was begun with"
            )


def is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """One run at a time in a directory; what a killed one left half written is removed."""
    directory = os.open(out, os.O_RDONLY)
    try:
        end = time.monotonic() + LOCK_WAIT
        while True:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise InputError(f"--out={out}: another prepare.py is writing there: wait for it") from None
                time.sleep(0.05)
                continue
            except OSError:  # a network's file system without locks
                pass
            break
        for path in (*out.iterdir(), *(out / UNFINISHED).glob("*")):
            if is_temporary(path):
                path.unlink(missing_ok=True)
        yield
    finally:
        os.close(directory)


def begun(plan: Plan, out: Path) -> dict[str, dict[str, Any]]:
    """Of each finished shard its part of the manifest. Raises InputError when the run was begun with other flags."""
    settings = plan.settings()
    manifest, unfinished = out / "manifest.json", out / UNFINISHED
    if manifest.exists():
        text = read_manifest(manifest)
        check_settings(out, text["made_from"], settings)
        return text["shards"]
    try:
        if (unfinished / "flags").exists():
            check_settings(out, read_json(unfinished / "flags"), settings)
        else:
            unfinished.mkdir(exist_ok=True)
            write_json(unfinished / "flags", settings)
    except OSError as error:
        raise InputError(f"--out={out}: {error.strerror}: make room or give another directory") from None
    return {path.stem: read_json(path) for path in unfinished.glob("*.json")}


def check_settings(out: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for name in {**here, **there}:
        if there.get(name) == here.get(name):
            continue
        if name == "dataset":
            raise InputError(f"--out={out}: holds {there.get(name)}, not {here[name]}: give another directory")
        if name == "classes":
            raise InputError(f"--out={out}: was begun with other classes: give its sources, or another directory")
        raise InputError(
            f"--out={out}: was begun with --{name}={there.get(name)}, here {here.get(name)}: "
            "give the same flags, or another directory"
        )


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}): delete it, and prepare the data set again") from None


def read_manifest(path: Path) -> dict[str, Any]:
    text = read_json(path)
    if not (isinstance(text, dict) and {"made_from", "images", "shards"} <= text.keys()):
        raise InputError(f"{path}: is no manifest of prepare.py: remove it, and prepare the data set again")
    return text


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_writer(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())


def digest(samples: Iterable[Sample]) -> str:
    """SHA-256 of what a shard is made from: names, labels, sizes, or the pixels."""
    summed = hashlib.sha256()
    for name, label, source, _, size in samples:
        summed.update(f"{name}\0{label}\0{size}\n".encode(errors="surrogateescape"))
        if isinstance(source, bytes):
            summed.update(source)
    return summed.hexdigest()


def is_there(shard: Path, part: Mapping[str, Any]) -> bool:
    with suppress(FileNotFoundError):
        return shard.stat().st_size == part["bytes"] and index_path(shard).exists()
    return False


def write_shards(
    plan: Plan, out: Path, tasks: Mapping[Path, tuple[int, list[Sample]]], workers: int, skip_bad: bool
) -> dict[str, dict[str, Any]]:
    """Writes each path with its samples, of which the first has that number; returns their parts of the manifest."""
    (out / UNFINISHED).mkdir(exist_ok=True)
    write = partial(
        write_shard, class_names=plan.class_names, encode=plan.encode, file_format=plan.file_format, skip_bad=skip_bad
    )
    parts, bad = {}, []
    try:
        with worker_pool(workers) as pool, progress(sum(len(samples) for _, samples in tasks.values())) as update:
            pending = {pool.submit(write, path, *task): path for path, task in tasks.items()}
            for done in as_completed(pending):
                path, part = pending[done], done.result()
                parts[path.name] = part
                bad += part["bad"]
                bad_here = [f"{name}: {why}" for name, why in part["bad"]]
                written = (
                    f"{path.name}: {part['images']} images" if skip_bad or not bad_here else f"{path.name}: not written"
                )
                update(len(tasks[path][1]), written, bad_here)
    except BrokenProcessPool:
        raise InputError(
            f"--workers={workers}: one was killed, perhaps for want of memory: run again with fewer, it goes on from "
            "here"
        ) from None
    if bad and not skip_bad:
        name, why = min(bad)
        raise InputError(
            f"{len(bad)} unreadable images, listed above, the first {name}: {why}: mend them and run again, "
            "or leave them out with --skip_bad"
        )
    return parts


class Unwritten(Exception):
    """Ends a shard that has unreadable images, so that none appears."""


def write_shard(
    path: Path,
    first: int,
    samples: list[Sample],
    *,
    class_names: tuple[str, ...],
    encode: Callable[[Sample], tuple[bytes, bool]],
    file_format: str,
    skip_bad: bool,
) -> dict[str, Any]:
    """A shard, in a worker: its index, its part of the manifest, then itself, so one that is there is complete.

    It is not written when images are unreadable and not to be skipped.
    """
    bad: list[tuple[str, str]] = []
    encoded_anew = 0

    def images() -> Iterator[Image]:
        nonlocal encoded_anew
        for number, sample in enumerate(samples, first):
            try:
                data, anew = encode(sample)
            except UnreadableImage as error:
                bad.append((sample.name, str(error)))
                continue
            if bad and not skip_bad:
                continue  # only what else is unreadable is of interest now
            encoded_anew += anew
            label = sample.label + LABEL_BASE[file_format]
            yield Image(f"{number:08d}", data, label, class_names[sample.label].encode(errors="surrogateescape"))

    part: dict[str, Any] = {"images": 0, "bad": bad}
    with suppress(Unwritten), atomic_writer(path) as file:
        summed = Summed(file)
        records, index = WRITERS[file_format](summed, images())
        if bad and not skip_bad:
            raise Unwritten
        part = {
            "images": records,
            "bytes": summed.size,
            "sha256": summed.sha256.hexdigest(),
            COUNTED[0]: encoded_anew,
            COUNTED[1]: bad,
            "source": digest(samples),
        }
        with atomic_writer(index_path(path)) as index_file:
            index_file.write(index.encode())
        write_json(path.parent / UNFINISHED / f"{path.name}.json", part)
    return part


class Image(NamedTuple):
    """What is stored of a sample; key: its number in the split, by which WebDataset names it."""

    key: str
    encoded: bytes
    label: int
    text: bytes


class Summed:
    """A file for writing that keeps the size and the SHA-256 of what it got."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


def features(image: Image) -> dict[str, list]:
    """Of a record, as ImageNet's TFRecords name them; bounding boxes are unknown."""
    return {
        "image/encoded": [image.encoded],
        "image/class/label": [image.label],
        "image/class/text": [image.text],
        **{f"image/object/bbox/{side}": [] for side in ("xmin", "ymin", "xmax", "ymax")},
    }


def write_tfrecords(file: Any, images: Iterator[Image]) -> tuple[int, str]:
    """Returns the number of records and the index."""
    records, at = [], 0
    for image in images:
        size = write_record(file, encode_example(features(image)))
        records.append((at, size))
        at += size
    return len(records), index_text(records)


def write_webdataset(file: Any, images: Iterator[Image]) -> tuple[int, str]:
    """A tar of key.jpg (or .png) and key.cls, the zero-based label in digits; the index is that of DALI's wds2idx."""
    lines = []
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for image in images:
            suffix = "png" if image.encoded.startswith(b"\x89PNG") else "jpg"
            components = []
            for extension, data in ((suffix, image.encoded), ("cls", str(image.label).encode())):
                member = tarfile.TarInfo(f"{image.key}.{extension}")
                member.size = len(data)
                components.append(f"{extension} {tar.offset + tarfile.BLOCKSIZE} {len(data)} {member.name}")
                tar.addfile(member, io.BytesIO(data))
            lines.append(" ".join(components))
    return len(lines), "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"


WRITERS = {"tfrecord": write_tfrecords, "webdataset": write_webdataset}


def finish(plan: Plan, out: Path, parts: Mapping[str, dict[str, Any]], images: Mapping[str, int]) -> None:
    """What stands beside the shards; manifest.json last, so that a directory with it is whole."""
    for name, text in plan.files.items():
        with atomic_writer(out / name) as file:
            file.write(text.encode())
    declared = {
        "num_classes": len(plan.class_names),
        "label_base": LABEL_BASE[plan.file_format],
        "class_names": plan.class_names,
        "images": images,
    }
    write_json(out / "dataset.json", declared)
    write_json(out / "manifest.json", {"made_from": plan.settings(), "images": images, "shards": parts})
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)


def is_complete(out: Path, title: str, file_format: str) -> bool:
    """Whether `out` holds all of a data set that only ever has one content; says so."""
    manifest = out / "manifest.json"
    if not manifest.exists():
        return False
    text = read_manifest(manifest)
    made_from = text["made_from"]
    complete = (
        (made_from["dataset"], made_from["format"]) == (title, file_format)
        and (out / "dataset.json").exists()
        and all(is_there(out / name, part) for name, part in text["shards"].items())
    )
    if complete:
        print(f"{title} in {out} is complete")
    return complete


def verify(directory: Path, workers: int) -> None:
    """Reads every byte and compares with manifest.json: sizes, SHA-256, CRCs of records, indexes.

    Raises InputError at the first shard, in order, that is not what was written.
    """
    manifest = directory / "manifest.json"
    if not manifest.exists():
        raise InputError(f"{manifest}: is missing, so nothing here can be verified: prepare the data set to its end")
    text = read_manifest(manifest)
    declared = read_dataset_json(directory / "dataset.json")
    if declared.get("images") != text["images"]:
        raise InputError(f"{directory}/dataset.json: its images are not those of manifest.json: prepare it again")
    shards = text["shards"]
    for path in sorted(directory.glob("*-of-*")):
        if path.name.removesuffix(".idx") not in shards and not is_temporary(path):
            raise InputError(f"{path}: is not in manifest.json: remove it, or prepare the data set anew")
    with worker_pool(workers) as pool, progress(sum(part["images"] for part in shards.values())) as update:
        check = partial(check_shard, file_format=text["made_from"]["format"])
        # In order, so that the first bad shard is named whichever is read first.
        pending = [pool.submit(check, directory / name, part) for name, part in shards.items()]
        for done, (name, part) in zip(pending, shards.items(), strict=True):
            done.result()
            update(part["images"], f"{name}: {part['images']} images, as written", [])
    print(f"{directory}: {len(shards)} shards with {sum(text['images'].values())} images are as they were written")


def check_shard(path: Path, part: Mapping[str, Any], file_format: str) -> None:
    """One shard and its index, in a worker."""
    try:
        size, sha256 = path.stat().st_size, hashlib.sha256()
        records = READERS[file_format](path, sha256)
        index = index_path(path).read_text()
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}): prepare the data set again") from None
    of_index, of_shard = ([line for line in text.splitlines() if not line.startswith("v")] for text in (index, records))
    pairs = enumerate(zip_longest(of_index, of_shard))
    where = next((f" at record {i}" for i, (one, other) in pairs if one != other), "")  # as far as places tell
    if size != part["bytes"]:
        raise InputError(
            f"{path}: has {size} bytes, not the {part['bytes']} of manifest.json{where}: make the file again"
        )
    if sha256.hexdigest() != part["sha256"]:
        raise InputError(
            f"{path}: holds other records than were written{where} (its SHA-256 differs): make the file again"
        )
    if index != records:
        raise InputError(f"{index_path(path)}: is wrong{where}: delete the file and prepare again")


def read_tfrecords(path: Path, sha256: Any) -> str:
    """The index that the shard should have. Raises InputError at a damaged record."""
    at, records = 0, []
    for data in read_records(path, sha256):
        records.append((at, len(data) + 16))
        at += len(data) + 16
    return index_text(records)


def read_webdataset(path: Path, sha256: Any) -> str:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    samples: list[list[str]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                if extension != "cls":
                    samples.append([])
                samples[-1].append(f"{extension} {member.offset_data} {member.size} {key}.{extension}")
    except (tarfile.TarError, ValueError, IndexError) as error:
        raise InputError(f"{path}: damaged at record {len(samples)} ({error}): make the file again") from None
    return "\n".join([f"v1.2 {len(samples)}", *map(" ".join, samples)]) + "\n"


READERS = {"tfrecord": read_tfrecords, "webdataset": read_webdataset}


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that leave Ctrl-C to this one and finish their shard, but end at once when this one is killed."""
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=start_worker, initargs=(os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    gc.freeze()  # a collection would write to every name and place of the data set, and end the sharing of their memory
    warnings.filterwarnings("ignore", module="PIL")  # what matters of it is an error here


@contextmanager
def progress(images: int) -> Iterator[Callable[[int, str, list[str]], None]]:
    """A bar with the time left on a terminal with tqdm, else a line per shard; what is wrong is printed either way.

    Yields what is to be called after each shard with its number of images, its line, and what is wrong with it.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None  # type: ignore[assignment, misc]
    if tqdm is not None and sys.stderr.isatty():
        with tqdm(total=images, unit="image", dynamic_ncols=True) as bar:

            def update(n: int, line: str, wrong: list[str]) -> None:
                for text in wrong:
                    bar.write(text)
                bar.update(n)

            yield update
    else:
        yield lambda n, line, wrong: print(*wrong, line, sep="\n", flush=True)


@lru_cache(maxsize=1)
def opened(path: str) -> BinaryIO:
    """The tar that a worker reads from, opened once."""
    return open(path, "rb", buffering=0)


def read_sample(sample: Sample) -> bytes:
    """The bytes of an image file, from a tar or a directory. Raises UnreadableImage."""
    assert isinstance(sample.source, str)
    try:
        if sample.offset == 0:
            return Path(sample.source, sample.name).read_bytes()
        data = os.pread(opened(sample.source).fileno(), sample.size, sample.offset)
    except OSError as error:
        raise UnreadableImage(f"cannot be read ({error.strerror})") from None
    if len(data) < sample.size:
        raise UnreadableImage(f"ends after {len(data)} of {sample.size} bytes")
    return data
