"""Damages files at random, and counts what their readers make of it.

python -m benchmarks.corruption [--inputs=1000] [--seed=1] [--out=DIR] [--jobs=N] [--only=NUMBER]

Input n of a seed is always the same: a file, and what is done to it. Bits flip, it is cut or longer, a run of bytes
becomes zeros, is there twice, or is removed. A process of its own reads it, and what nvcnn would do then is

detected     one line says what is wrong (`InputError`)
tolerated    what is read is what was written
changed      something else is read, without a word, from a file that has no checksum: nobody can tell
wrong        the same, where checksums cover the file: must be 0
traceback    any other exception: must be 0
died, hung   the process ended, or had no answer in LIMIT seconds: must be 0

DIR (benchmarks/results) gets corruption.json, with a row for each reader, and corruption.md. Exit code 1: there is one
that must not be.
"""

import argparse
import hashlib
import io
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.faults import RESULTS, difference
from nvcnn import checkpoint, plot, weights
from nvcnn.data import pillow
from nvcnn.data.dataset import find_dataset
from nvcnn.prepare import folder
from nvcnn.prepare.encode import Encoding
from nvcnn.prepare.manifest import read_manifest
from nvcnn.prepare.verify import verify
from nvcnn.prepare.write import write_dataset
from nvcnn.program import InputError
from nvcnn.settings import Settings, parse

LIMIT = 30  # seconds
MEMORY = 16 << 30  # bytes of addresses a process may have: what is asked for by a damaged size shows
OUTCOMES = ("detected", "tolerated", "changed", "wrong", "traceback", "died", "hung")
BAD = OUTCOMES[3:]
CLASSES, TRAIN, VALIDATION = 12, 36, 12


@dataclass(frozen=True)
class Reader:
    """Is what reads a file. read: returns what is compared, of a directory and the file in it.

    material: the directory; pattern: of the files in it of which one is damaged, and `gone` of those that are removed.
    covered: checksums, or what is told twice, cover all of the file.
    """

    name: str
    material: str
    pattern: str
    read: Callable[[Path, Path], Any]
    covered: bool
    gone: str = ""


def samples(directory: Path, _: Path) -> Any:
    """Returns classes and samples of a data set, as `--data_backend=torch` trains on them."""
    found = []
    for split in ("train", "validation"):
        dataset = find_dataset(directory, num_classes=None, label_base=None, split=split)
        source = dataset.source(split)
        for i in range(len(source)):
            data, label = source.read(i)
            number = dataset.zero_based(label, source.name(i))
            try:
                pixels = hashlib.sha256(pillow.decode(data).tobytes()).hexdigest()
            except ValueError as error:
                raise InputError(pillow.undecodable(source.name(i), str(error))) from None
            found.append((number, pixels))
    return dataset.class_names, found


def verified(directory: Path, _: Path) -> None:
    verify(directory, workers=1)


def recipe(_: Path, file: Path) -> Settings:
    return parse(Settings, [f"--recipe={file}", "--data_dir=/data"])


def image(_: Path, file: Path) -> str:
    try:
        return hashlib.sha256(pillow.decode(file.read_bytes()).tobytes()).hexdigest()
    except ValueError as error:
        raise InputError(str(error)) from None


READERS = (
    Reader("checkpoint", "run", "checkpoint-00000003.pt", lambda _, file: checkpoint.load(file), True),
    Reader(
        "weights of export.py",
        "run",
        "weights.pt",
        lambda _, file: vars(weights.read("init", str(file), None, None)) | {"path": None},
        True,
    ),
    Reader("TFRecords", "tfrecord", "*-of-00002", samples, True),
    Reader("TFRecords without an index", "tfrecord", "*-of-00002", samples, True, "*.idx"),
    Reader("index of TFRecords", "tfrecord", "*.idx", samples, True),
    Reader("tars", "webdataset", "*.tar", samples, False),
    Reader("tars without an index", "webdataset", "*.tar", samples, False, "*.idx"),
    Reader("index of tars", "webdataset", "*.idx", samples, True),
    Reader("TFRecords, prepare.py --verify", "tfrecord", "*", verified, True),
    Reader("tars, prepare.py --verify", "webdataset", "*", verified, True),
    Reader("dataset.json", "tfrecord", "dataset.json", samples, False),
    Reader("manifest.json", "tfrecord", "manifest.json", lambda _, file: read_manifest(file), True),
    Reader("recipe", "recipes", "*.yaml", recipe, False),
    Reader("metrics.jsonl", "run", "metrics.jsonl", lambda directory, _: vars(plot.history(directory)), False),
    Reader("JPEG", "images", "*.jpg", image, False),
    Reader("PNG", "images", "*.png", image, False),
    Reader("WebP", "images", "*.webp", image, False),
    Reader("TIFF", "images", "*.tiff", image, False),
)


def photograph(seed: int) -> Any:
    """Returns a smooth picture, which JPEG keeps nearly as it was."""
    from PIL import Image

    pixels = random.Random(seed).randbytes(4 * 3 * 3)
    return Image.frombytes("RGB", (4, 3), pixels).resize((48, 32), Image.Resampling.BICUBIC)


def make(work: Path) -> None:
    """Writes what is damaged."""
    for i in range(TRAIN + VALIDATION):
        split = "train" if i < TRAIN else "val"
        path = work / "pictures" / split / f"class{i % CLASSES:02d}" / f"{i:03d}.{'jpg' if i % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(i).save(path)
    for file_format in ("tfrecord", "webdataset"):
        made = folder.blueprint(
            work / "pictures/train",
            val=work / "pictures/val",
            encoding=Encoding(("JPEG", "PNG")),
            shards=(2, 2),
            file_format=file_format,
        )
        write_dataset(made, work / file_format)
    for name in ("run", "images", "recipes"):
        (work / name).mkdir()
    state: dict[str, Any] = {"weights": {f"layer{i}.weight": torch.randn(40, 30) for i in range(5)}}
    state |= {"settings": {"model": "lenet", "label_base": 1, "fp16": False, "bf16": False}, "ranks": [{}, {}]}
    state |= {"optimizer": {"counters": torch.tensor([3, 3, 3])}, "model": "lenet", "num_classes": CLASSES}
    checkpoint.save(work / "run/checkpoint-00000003.pt", state, None)
    told: dict[str, Any] = {
        "format": weights.FORMAT,
        "version": weights.VERSION,
        "model": "lenet",
        "num_classes": 2,
        "options": {},
    }
    told |= {"class_names": ["a", "b"], "preprocessing": {"image_size": 28, "normalize": "imagenet", "eval_crop": 1.0}}
    with (work / "run/weights.pt").open("w+b") as file:
        checkpoint.write(told | {"state_dict": {"fc2.weight": torch.randn(2, 512)}}, file)
    lines = [f'{{"event": "train", "step": {i}, "epoch": 1, "loss": {1 / i}, "time": 1.5}}\n' for i in range(1, 30)]
    start = '{"event": "start", "step": 0, "steps": 29, "steps_per_epoch": 10, "ranks": 1}\n'
    (work / "run/metrics.jsonl").write_text(start + "".join(lines))
    for i, kind in enumerate(("jpg", "png", "webp", "tiff")):
        photograph(i).save(work / "images" / f"picture.{kind}")
    for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml"):
        shutil.copy(path, work / "recipes")


def damaged(data: bytes, chance: random.Random) -> tuple[bytes, str]:
    """Returns other bytes than `data`, and what was done."""
    while True:
        changed = bytearray(data)
        at, size = chance.randrange(len(data)), min(len(data), 1 << chance.randrange(13))
        what = chance.choice(("a bit", "some bits", "cut", "zeros", "twice", "removed", "behind"))
        if what in ("a bit", "some bits"):
            for _ in range(1 if what == "a bit" else chance.randint(2, 20)):
                changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif what == "cut":
            del changed[at:]
        elif what == "zeros":
            changed[at : at + size] = bytes(len(changed[at : at + size]))
        elif what == "twice":
            changed[at:at] = data[at : at + size]
        elif what == "removed":
            del changed[at : at + size]
        else:
            changed += chance.randbytes(size)
        if changed != data:
            return bytes(changed), f"{what} at byte {at}, {size} bytes"


@dataclass(frozen=True)
class Input:
    number: int
    reader: Reader
    file: str  # below the material
    data: bytes
    what: str


def draw(work: Path, seed: int, number: int) -> Input:
    """Returns input `number` of a seed."""
    chance, reader = random.Random(f"corruption {seed} {number}"), READERS[number % len(READERS)]
    material = work / reader.material
    files = [path for path in sorted(material.glob(reader.pattern)) if path.is_file()]
    file = chance.choice(files)
    return Input(number, reader, file.name, *damaged(file.read_bytes(), chance))


def read(work: Path, reader: Reader, file: str, data: bytes | None = None) -> Any:
    """Returns what the reader finds in a copy of the material, in which a file has other data."""
    with tempfile.TemporaryDirectory(dir=work) as temporary, redirect_stdout(io.StringIO()):
        directory = Path(temporary)
        shutil.copytree(work / reader.material, directory, dirs_exist_ok=True)
        for path in directory.glob(reader.gone) if reader.gone else ():
            path.unlink()
        if data is not None:
            (directory / file).write_bytes(data)
        with redirect_stderr(io.StringIO()):
            return reader.read(directory, directory / file)


def outcome(work: Path, given: Input, known: dict[tuple[str, str], Any]) -> tuple[str, str]:
    """Returns one of OUTCOMES, and what was said. known: what is read of whole files, by reader and file."""
    reader = given.reader
    try:
        found = read(work, reader, given.file, given.data)
    except (InputError, PermissionError) as error:
        return ("detected", str(error)) if len(str(error).splitlines()) == 1 else ("traceback", str(error))
    except BaseException:
        return "traceback", traceback.format_exc()
    if not (where := unlike(known[reader.name, given.file], found)):
        return "tolerated", ""
    return ("wrong" if reader.covered else "changed"), where


def known_of(work: Path, given: Iterable[Input]) -> dict[tuple[str, str], Any]:
    """Returns what is read of the files as they were written, by reader and file. That must go well."""
    files = {(one.reader.name, one.file): one.reader for one in given}
    return {(name, file): read(work, reader, file) for (name, file), reader in files.items()}


def unlike(one: Any, other: Any) -> str:
    return difference(one, other, "content")


def serve(work: Path, seed: int, known: dict[tuple[str, str], Any], pipe: Any) -> None:
    """Is a process that answers the numbers of inputs which are sent to it, until it gets 0."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    while number := pipe.recv():
        pipe.send(outcome(work, draw(work, seed, number), known))


class Process:
    """Reads inputs one by one in a process, which is begun anew when it has died or hangs."""

    def __init__(self, work: Path, seed: int, known: dict[tuple[str, str], Any]):
        self.work, self.seed, self.known = work, seed, known
        self.begin()

    def begin(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(self.work, self.seed, self.known, theirs))
        self.process.start()
        theirs.close()

    def __call__(self, number: int) -> tuple[str, str]:
        self.pipe.send(number)
        try:
            if self.pipe.poll(LIMIT):
                return self.pipe.recv()
            found = "hung", f"no answer in {LIMIT} s"
        except (EOFError, OSError):
            self.process.join()
            found = "died", f"exit code {self.process.exitcode}"
        self.process.kill()
        self.process.join()
        self.begin()
        return found

    def close(self) -> None:
        self.pipe.send(0)
        self.process.join()


def rows_of(found: list[tuple[Input, str, str]]) -> list[dict[str, Any]]:
    """Returns a row for each reader, and one for all."""
    rows = []
    for reader in (*READERS, None):
        outcomes = [what for given, what, _ in found if reader in (None, given.reader)]
        row: dict[str, Any] = {"read": reader.name if reader else "all", "inputs": len(outcomes)}
        rows.append(row | {what: outcomes.count(what) for what in OUTCOMES})
    return rows


def try_all(
    numbers: list[int], seed: int, jobs: int, say: Callable[[str], None] = print
) -> list[tuple[Input, str, str]]:
    """Returns each input, what came of it, and what was said."""
    with tempfile.TemporaryDirectory(prefix="nvcnn-") as temporary:
        work = Path(temporary)
        with redirect_stdout(io.StringIO()):
            make(work)
        found: list[tuple[Input, str, str]] = []
        pillow.require_pillow()
        known = known_of(work, (draw(work, seed, number) for number in numbers))
        processes = [Process(work, seed, known) for _ in range(jobs)]

        def share(job: int) -> None:
            for number in numbers[job::jobs]:
                given = draw(work, seed, number)
                what, said = processes[job](number)
                found.append((given, what, said))
                if what in BAD:
                    say(f"{number}: {given.reader.name}, {given.file}, {given.what}: {what}\n{said}")

        try:
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(share, range(jobs)))
        finally:
            for process in processes:
                process.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corruption", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--inputs", type=int, default=1000, help="files to damage (1000)")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn (1)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (one a core)")
    parser.add_argument("--only", type=int, help="this input alone; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the results (benchmarks/results)")
    options = parser.parse_args()
    numbers = [options.only] if options.only else list(range(1, options.inputs + 1))
    found = try_all(numbers, options.seed, 1 if options.only else options.jobs, partial(print, flush=True))
    if options.only:
        print(*found[0][1:])
    rows = rows_of(found)
    if not options.only:
        options.out.mkdir(parents=True, exist_ok=True)
        report.write(str(options.out / "corruption.json"), "corruption", rows)
        report.write_page(options.out / "corruption.md", "Damaged files", "corruption", rows)
    print(report.table(rows))
    return int(any(what in BAD for _, what, _ in found))


if __name__ == "__main__":
    sys.exit(main())
