"""Measures how many JPEGs per second a core turns into random 224 x 224 crops, with our readers and with others.

python -m benchmarks.data --photographs DIR [--files N] [--rounds N] [--batches N] [--json FILE]

DIR holds photographs of some megapixels. JPEGs of ImageNet's sizes (about 400 x 350 pixels, 110 kB) are cut from them,
with a class for each photograph, and prepared by `prepare.py folder`. All contenders draw crops by the same rules (10 -
100 % of the area, aspect 0.8 - 1.25), resize with antialiasing, flip, and hand out uint8 batches of 64, on all cores
that they may use.

CPU time is what counts, that of this process and its workers, so that a core's images per second do not depend on what
else runs beside it. Contenders take turns; what one has read ahead is thrown away before its turn is timed.
"""

import argparse
import io
import math
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import benchmarks.peers  # noqa: F401 (makes torchvision importable)
from benchmarks import report, timing
from nvcnn.data.backend import open_training
from nvcnn.data.dataset import find_dataset
from nvcnn.prepare import folder
from nvcnn.prepare.encode import SUFFIXES, Encoding
from nvcnn.prepare.write import write_dataset

SIZE, BATCH = 224, 64
AREA, ASPECT = (0.1, 1.0), (0.8, 1.25)
CORES = len(os.sched_getaffinity(0))
LONG, SHORT = 445, 345  # sides of the median image, in pixels
SPREAD = 0.3  # the standard deviation of the logarithm of an image's sides
QUALITY = 99  # gives as many bytes a pixel as ImageNet has: photographs that are scaled down are smooth
READ_AHEAD = 2 * CORES + 2  # a contender has at most so many batches ready
SETTLE = 0.5  # in so many seconds after its turn it has read them
MAX_SIDE = 400  # --max_side of the smaller copy

Batches = Iterator[Any]


@dataclass(frozen=True)
class Material:
    """Holds the directories with the same images in all forms."""

    folders: Path
    records: Path
    smaller: Path  # records that were prepared with --max_side
    tars: Path


def cut(photograph: Path, directory: Path, numbers: range) -> None:
    """Writes a JPEG for each number: a part of the photograph, made two to six times smaller."""
    from PIL import Image

    directory.mkdir(parents=True)
    whole = Image.open(photograph).convert("RGB")
    for n in numbers:
        draw = random.Random(n)
        scale = math.exp(draw.gauss(0, SPREAD))
        width, height = (LONG * scale, SHORT * scale) if draw.random() < 0.7 else (SHORT * scale, LONG * scale)
        zoom = min(draw.uniform(2, 6), whole.width / width, whole.height / height)
        w, h = int(width * zoom), int(height * zoom)
        left, top = draw.randint(0, whole.width - w), draw.randint(0, whole.height - h)
        part = whole.crop((left, top, left + w, top + h))
        image = part.resize((round(width), round(height)), Image.Resampling.LANCZOS, reducing_gap=2)
        image.save(directory / f"{n:06d}.jpg", quality=QUALITY)


def cut_all(photographs: list[Path], directory: Path, files: int) -> None:
    """Writes `files` JPEGs into class folders, with a class for each photograph."""
    with ProcessPoolExecutor(CORES) as pool:
        shares = [range(n, files, len(photographs)) for n in range(len(photographs))]
        folders = [directory / f"{n:02d}" for n in range(len(photographs))]
        list(pool.map(cut, photographs, folders, shares))


def described(folders: Path) -> str:
    from PIL import Image

    paths = list(folders.rglob("*.jpg"))
    sizes = [Image.open(path).size for path in paths]
    width, height = (sum(side) / len(sizes) for side in zip(*sizes, strict=True))
    kilobytes = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
    return f"{len(paths)} JPEGs, on average {width:.0f} x {height:.0f} pixels, {kilobytes:.0f} kB"


def prepared(folders: Path, out: Path, max_side: int | None = None, file_format: str = "tfrecord") -> Path:
    with redirect_stdout(io.StringIO()):
        encoding = Encoding(max_side=max_side)
        blueprint = folder.blueprint(folders, encoding=encoding, shards=(8,), file_format=file_format, workers=CORES)
        write_dataset(blueprint, out, workers=CORES)
    return out


def reader(records: Path, backend: str) -> Any:
    return open_training(
        find_dataset(records, num_classes=None, label_base=None, split="train"),
        backend,
        batch_size=BATCH,
        image_size=SIZE,
        crop_area=AREA,
        crop_aspect=ASPECT,
        seed=1,
        rank=0,
        ranks=1,
        device=torch.device("cpu"),
        threads=CORES,
    )


def crops(material: Material) -> Batches:
    """Yields what a core still has to make when a GPU resizes, as with `--data_backend=dali_cpu` on a GPU."""
    pipeline = reader(material.records, "dali_cpu").pipeline.pipeline
    while True:
        yield pipeline.run()


def transform() -> Callable:
    from torchvision import transforms

    crop = transforms.RandomResizedCrop(SIZE, AREA, ASPECT)
    return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])


def torchvision(material: Material) -> Batches:
    """Yields batches as torchvision's and timm's training scripts read them."""
    from torchvision.datasets import ImageFolder

    loader: DataLoader = DataLoader(
        ImageFolder(str(material.folders), transform()),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=CORES,
        persistent_workers=True,
    )
    while True:
        yield from loader


def webdataset(material: Material) -> Batches:
    import webdataset as wds

    shards = sorted(map(str, material.tars.glob("*.tar")))
    data = wds.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(256).decode("pil")
    data = data.to_tuple("jpg", "cls").map_tuple(transform(), int).batched(BATCH)
    yield from DataLoader(data, batch_size=None, num_workers=CORES)


def tf_data(material: Material) -> Batches:
    """Yields batches as TensorFlow's own ImageNet script reads them: only the crop is decoded."""
    import tensorflow as tf

    def sample(record: Any) -> Any:
        data = tf.io.parse_single_example(record, {"image/encoded": tf.io.FixedLenFeature([], tf.string)})
        data = data["image/encoded"]
        start, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            tf.zeros([1, 0, 4]),
            min_object_covered=0.0,
            aspect_ratio_range=ASPECT,
            area_range=AREA,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        image = tf.image.decode_and_crop_jpeg(data, tf.concat([start[:2], size[:2]], 0), channels=3)
        image = tf.image.random_flip_left_right(tf.image.resize(image, [SIZE, SIZE], antialias=True))
        return tf.cast(tf.round(image), tf.uint8)

    shards = sorted(str(p) for p in material.records.glob("train-*") if p.suffix != ".idx")
    options = tf.data.Options()
    options.threading.private_threadpool_size = CORES
    data = tf.data.TFRecordDataset(shards).shuffle(256).repeat().map(sample, num_parallel_calls=CORES)
    yield from data.batch(BATCH).prefetch(2).with_options(options)


def ffcv(material: Material) -> Batches:
    """Yields ffcv's batches, resized by OpenCV's INTER_AREA.

    Its files cannot hold the JPEGs as they are, so these are encoded anew at the same quality.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    file = str(material.folders) + ".beton"
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=QUALITY), "label": IntField()}
    DatasetWriter(file, fields, num_workers=CORES).from_indexed_dataset(ImageFolder(str(material.folders)))
    crop = RandomResizedCropRGBImageDecoder((SIZE, SIZE), AREA, ASPECT)
    loader = Loader(
        file,
        BATCH,
        num_workers=CORES,
        order=OrderOption.RANDOM,
        os_cache=True,
        pipelines={"image": [crop, RandomHorizontalFlip(), ToTensor()], "label": [IntDecoder(), ToTensor()]},
    )
    while True:
        yield from loader


def libjpeg_turbo(material: Material) -> Batches:
    """Yields whole images, decoded from memory with the settings of Pillow and of DALI. Nothing else is done."""
    import simplejpeg

    images = [path.read_bytes() for path in sorted(material.folders.rglob("*.jpg"))[: 16 * BATCH]]
    while True:
        for first in range(0, len(images) - BATCH + 1, BATCH):
            yield [simplejpeg.decode_jpeg(data) for data in images[first : first + BATCH]]


OURS = "nvcnn, DALI"
DALI = "nvidia-dali-cuda130"
CONTENDERS: dict[str, tuple[str, Callable[[Material], Batches]]] = {  # by name: its package, and what opens it
    OURS: (DALI, lambda material: iter(reader(material.records, "dali_cpu"))),
    "nvcnn, DALI, resized by a GPU": (DALI, crops),
    f"nvcnn, DALI, --max_side={MAX_SIDE}": (DALI, lambda material: iter(reader(material.smaller, "dali_cpu"))),
    "nvcnn, --data_backend=torch": ("pillow", lambda material: iter(reader(material.records, "torch"))),
    "torchvision, PIL DataLoader": ("torchvision", torchvision),
    "webdataset, PIL DataLoader": ("webdataset", webdataset),
    "tf.data": ("tensorflow-cpu", tf_data),
    "ffcv": ("ffcv", ffcv),
    "libjpeg-turbo alone, whole images": ("simplejpeg", libjpeg_turbo),
}


def cpu_seconds() -> float:
    """Returns the CPU seconds so far, of this process and of its workers that are alive."""
    seconds = time.process_time()
    for child in multiprocessing.active_children():
        with suppress(OSError):
            user, system = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
            seconds += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return seconds


def turn(batches: Batches, count: int) -> float:
    """Returns the CPU milliseconds per image over `count` batches."""
    for _ in range(READ_AHEAD):
        next(batches)
    start = cpu_seconds()
    for _ in range(count):
        next(batches)
    spent = cpu_seconds() - start
    time.sleep(SETTLE)
    return spent * 1e3 / (count * BATCH)


def compare(material: Material, names: list[str], *, rounds: int, count: int) -> list[dict[str, Any]]:
    """Returns a row for each of `names` against ours, in turns of `count` batches. The first turn of each warms up."""
    opened: dict[str, Batches] = {}
    times: dict[str, list[float]] = {name: [] for name in (OURS, *names)}
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(rounds + 1):
        for name in [name for name in times if name not in rows]:
            try:
                if name not in opened:
                    opened[name] = CONTENDERS[name][1](material)
                times[name].append(turn(opened[name], count))
            except Exception as error:  # whatever a peer raises is its result
                if name == OURS:
                    raise
                rows[name] = timing.missing(f"{OURS} / {name}", "images/s", error)
    for name in names:
        if name not in rows:
            package, ours = CONTENDERS[name][0], times[OURS]
            note = f"{package} {metadata.version(package)}"
            rows[name] = timing.row(f"{OURS} / {name}", "images/s", ours[1:], times[name][1:], images=1, note=note)
    return [rows[name] for name in names]


def spent_by(step: Callable[[], object]) -> float:
    """Returns the CPU milliseconds that `step` takes, in this process and in those that it starts and ends."""

    def so_far() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    start = so_far()
    step()
    return (so_far() - start) * 1e3


def preparation(folders: Path, out: Path, rounds: int) -> dict[str, Any]:
    """Returns the row of `prepare.py folder`, which need not encode these images, against a mere copy of the files."""
    megabytes = sum(path.stat().st_size for path in folders.rglob("*.jpg")) / 1e6
    steps: dict[str, Callable[..., object]] = {"prepare.py folder": prepared, "a copy of the files": shutil.copytree}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(spent_by(partial(step, folders, out)))
            shutil.rmtree(out)
    return timing.row(" / ".join(steps), "MB/s", *times.values(), images=megabytes)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--photographs", type=Path, required=True, metavar="DIR", help="of photographs to cut from")
    parser.add_argument("--files", type=int, default=4000, help="JPEGs to cut (4000)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (7)")
    parser.add_argument("--batches", type=int, default=16, help="batches of a turn (16)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args()
    photographs = sorted(p for p in arguments.photographs.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not photographs:
        parser.error(f"--photographs={arguments.photographs}: there are no images: give a directory of photographs")
    with tempfile.TemporaryDirectory(prefix="nvcnn-") as temporary:
        directory = Path(temporary)
        folders = directory / "folders"
        cut_all(photographs, folders, arguments.files)
        print(described(folders), flush=True)
        rows = [preparation(folders, directory / "out", arguments.rounds)]
        material = Material(
            folders,
            prepared(folders, directory / "records"),
            prepared(folders, directory / "smaller", max_side=MAX_SIDE),
            prepared(folders, directory / "tars", file_format="webdataset"),
        )
        kilobytes = sum(path.stat().st_size for path in material.smaller.glob("train-*")) / arguments.files / 1e3
        print(f"With --max_side={MAX_SIDE}: {kilobytes:.0f} kB", flush=True)
        peers = [name for name in CONTENDERS if name != OURS]
        rows += compare(material, peers, rounds=arguments.rounds, count=arguments.batches)
    if arguments.json:
        report.write(arguments.json, "data", rows)
    print(f"of a core, by CPU time\n{report.table(timing.shown(rows))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
