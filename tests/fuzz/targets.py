"""What reads files of strangers, as functions of such a file's bytes and an empty folder.

For any bytes a target returns, or raises `REFUSED`: anything else is a finding, as is much time or memory. `make fuzz`
searches for findings (run.py). The tests take the seeds, which are real files, and what was found before (found/).
"""

import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image
from safetensors.torch import save as safetensors

from nvcnn import checkpoint, recipes, weights
from nvcnn.data import headers, pillow, records, tfrecord
from nvcnn.data.dataset import read_dataset_json
from nvcnn.data.records import Records
from nvcnn.data.shard_source import ShardSource, index_path
from nvcnn.data.tars import Tars
from nvcnn.prepare import cifar10, fashion_mnist, imagenet
from nvcnn.prepare.encode import Encoding, UnreadableImage, standard
from nvcnn.prepare.manifest import as_json, read_manifest, read_part, summed
from nvcnn.program import InputError
from tests.samples import add, file_of, record

ROOT = Path(__file__).parent
REFUSED = (InputError, UnreadableImage)
FLAGS = {"batch_size": False, "fp16": True, "model": False, "learning_rate": False}
PIXELS = 2**16  # of an image at most: a larger one is refused at its header, as one of 200 million is


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@contextmanager
def without_sums() -> Iterator[None]:
    """Any checksum is right: a search finds none by chance, while a stranger computes it."""
    with (
        patch.object(tfrecord, "masked_crc", lambda data: 0),
        patch.object(records, "masked_crc", lambda data: 0),
        patch.object(tarfile, "calc_chksums", lambda header: range(-(1 << 99), 1 << 99)),
    ):
        yield


def read_all(source: type[ShardSource], folder: Path) -> None:
    """Opens the shards there, as a run does and as one with --skip_bad_images, and reads each sample."""
    for lenient in (False, True):
        with suppress(InputError):
            found = source.find(folder, "train", lenient)
            for i in range(min(len(found), 100)):
                with suppress(InputError):
                    found.read(i)
                found.name(i)


def example(data: bytes, folder: Path) -> None:
    records.parse(data, "a record")


def tfrecords(data: bytes, folder: Path) -> None:
    written(folder, "train-0", data)
    with without_sums():
        read_all(Records, folder)


def tfrecord_index(data: bytes, folder: Path) -> None:
    index_path(written(folder, "train-0", shard())).write_bytes(data)
    with without_sums():
        read_all(Records, folder)


def tar(data: bytes, folder: Path) -> None:
    written(folder, "train-0.tar", data)
    with without_sums():
        read_all(Tars, folder)


def tar_index(data: bytes, folder: Path) -> None:
    index_path(written(folder, "train-0.tar", samples())).write_bytes(data)
    read_all(Tars, folder)


def archive(data: bytes, folder: Path) -> None:
    path = written(folder, "archive", data)
    for read in (imagenet.read_devkit, cifar10.read_batches, lambda path: list(imagenet.members(path, "--val"))):
        with suppress(InputError), without_sums():
            read(path)


def meta_mat(data: bytes, folder: Path) -> None:
    imagenet.read_meta("--devkit", data)


def image(data: bytes, folder: Path) -> None:
    headers.shown_alike(data)
    headers.jpeg_bits(data)
    with patch.object(pillow, "MAX_PIXELS", PIXELS), patch.object(Image, "MAX_IMAGE_PIXELS", PIXELS // 2):
        with suppress(ValueError):
            pillow.decode(data)
        standard(data, Encoding(keep=("JPEG",)))


def recipe(data: bytes, folder: Path) -> None:
    list(recipes.read(str(written(folder, "recipe.yaml", data)), FLAGS))


def opened(path: Path) -> None:
    """Takes weights and the state of a run from a file, as --init, --checkpoint and a run that goes on do."""
    with suppress(InputError):
        weights.load_model(weights.read("init", str(path), None, None))
    with suppress(InputError):
        weights.load_model(weights.read("init", str(path), "lenet", "nvcnn"))
    checkpoint.newest(path.parent, warn=lambda line: None)


def torch_file(data: bytes, folder: Path) -> None:
    opened(written(folder, "checkpoint-00000001.pt", data))


def torch_content(data: bytes, folder: Path) -> None:
    """What is pickled in a file of torch.save, which beside it has storages of 64 bytes, as those of `state`."""
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        storages = {f"data/{n}": bytes(64) for n in range(4)}
        for name, part in {"data.pkl": data, "byteorder": b"little", **storages, "version": b"3\n"}.items():
            file.writestr(f"archive/{name}", part)
    torch_file(zipped.getvalue(), folder)


def safetensors_file(data: bytes, folder: Path) -> None:
    with suppress(InputError):
        weights.load_model(weights.read("init", str(written(folder, "file.safetensors", data)), None, None))
    weights.load_model(weights.read("init", str(folder / "file.safetensors"), "lenet", "nvcnn"))


def idx(data: bytes, folder: Path) -> None:
    name = next(iter(fashion_mnist.SHA256))
    written(folder, f"{name}.gz", data)
    fashion_mnist.read_idx(folder, name)


def cifar(data: bytes, folder: Path) -> None:
    for name in ("data_batch_1.bin", "data_batch_1"):
        with suppress(InputError):
            cifar10.checked_batch(folder, name, data)


def dataset_json(data: bytes, folder: Path) -> None:
    read_dataset_json(written(folder, "dataset.json", data))


def manifest_json(data: bytes, folder: Path) -> None:
    with suppress(InputError):
        read_manifest(written(folder, "manifest.json", data))
    read_part(folder / "manifest.json")


def jpeg() -> bytes:
    return file_of(Image.new("RGB", (16, 16), (200, 100, 50)), orientation=6)


def shard() -> bytes:
    """Returns a file of TFRecords whose CRCs are zeros."""
    stored = [record(jpeg(), label) for label in (1, 2)]
    return b"".join(struct.pack("<QI", len(data), 0) + data + bytes(4) for data in stored)


def samples(format: int = tarfile.USTAR_FORMAT, mode: str = "w", **files: bytes) -> bytes:
    """Returns a tar of two samples, or of these files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode, format=format) as file:  # type: ignore[call-overload]
        for name, content in (files or {"0.jpg": jpeg(), "0.cls": b"0", "1.jpg": jpeg(), "1.cls": b"1"}).items():
            add(file, name, content)
    return data.getvalue()


def indexes(source: type[ShardSource], data: bytes, name: str, folder: Path) -> list[bytes]:
    path = written(folder, name, data)
    return [source.index_text(list(source.scan(path))).encode()]


def saved(content: object, **options: object) -> bytes:
    data = io.BytesIO()
    torch.save(content, data, **options)
    return data.getvalue()


def state() -> dict:
    numbers = torch.zeros(16)
    return {
        "format": checkpoint.FORMAT,
        "version": checkpoint.VERSION,
        "model": "lenet",
        "num_classes": 10,
        "class_names": [],
        "settings": {"label_base": 0, "fp16": False, "bf16": False},
        "preprocessing": {"image_size": 28, "normalize": "imagenet", "eval_crop": 1.0},
        "options": {},
        "weights": {"fc.weight": numbers.view(4, 4), "fc.bias": numbers[:4]},
        "optimizer": {"counters": torch.arange(8)},
    }


def exported() -> dict[str, str]:
    kept = {name: state()[name] for name in ("model", "num_classes", "class_names", "preprocessing", "options")}
    return {"format": "pt", "nvcnn": '"1.0"'} | {name: json.dumps(value) for name, value in kept.items()}


def images() -> list[bytes]:
    picture = Image.new("RGB", (16, 16), (200, 100, 50))
    kinds = ("PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF", "JPEG2000")
    grey = file_of(picture.convert("L")), file_of(picture.convert("CMYK")), file_of(picture.convert("P"), "PNG")
    return [jpeg(), *grey, *(file_of(picture, kind) for kind in kinds), file_of(picture, "PNG", orientation=3)]


def tars() -> list[bytes]:
    kinds = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT
    long = {"d" * 120 + "/0.jpg": jpeg(), "ä.cls": b"0"}
    return [samples(), *(samples(kind, **long) for kind in kinds)]


def archives() -> list[bytes]:
    kit = {"kit/data/meta.mat": b"MATLAB 5.0 MAT-file", "kit/data/ILSVRC2012_validation_ground_truth.txt": b"1\n"}
    return [*tars(), *(samples(mode=mode, **kit) for mode in ("w", "w:gz", "w:xz", "w:bz2"))]


def synsets() -> list[bytes]:
    import numpy as np
    from scipy.io import savemat

    rows = np.array([(1, "n0", "a, b"), (2, "n1", "c")], [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words")])
    files = io.BytesIO(), io.BytesIO()
    for file, packed in zip(files, (False, True), strict=True):
        savemat(file, {"synsets": rows}, do_compression=packed)
    return [file.getvalue() for file in files]


def declared() -> list[bytes]:
    return [json.dumps({"num_classes": 2, "label_base": 1, "class_names": ["a", "b"], "images": {"train": 9}}).encode()]


def manifests() -> list[bytes]:
    part = {"images": 1, "bytes": 9, "sha256": "0", "encoded_anew": 0, "bad": [], "source": "0"}
    made_from = {"dataset": "Class folders", "format": "tfrecord"}
    return [summed({"made_from": made_from, "images": {}, "files": {}, "shards": {"train-0": part}}), as_json(part)]


def batches() -> list[bytes]:
    import pickle

    import numpy as np

    batch = {b"data": np.zeros((2, cifar10.PIXELS), np.uint8), b"labels": [3, 4]}
    return [bytes(cifar10.PIXELS + 1), *(pickle.dumps(batch, protocol) for protocol in range(5))]


def pickled() -> list[bytes]:
    """Returns what torch.save pickles of a checkpoint, of weights alone, and of a file of export.py."""
    own = {"format": weights.FORMAT, "version": 1, "state_dict": state()["weights"]} | state()
    contents = state(), state()["weights"], own | {"format": weights.FORMAT}
    files = [zipfile.ZipFile(io.BytesIO(saved(content))) for content in contents]
    return [file.read(name) for file in files for name in file.namelist() if name.endswith("data.pkl")]


def recipe_seeds() -> list[bytes]:
    own = (
        b'%YAML 1.2\n---\nbatch_size: &n 256  # a note\nfp16: true\nmodel: "le\\u006eet"\nlearning_rate: [1, *n]\n...\n'
    )
    return [own, b"? model\n: >-\n  lenet\nfp16: !!bool false\n", b"{model: lenet, batch_size: 0x10}"]


def written_by(make: Callable[[dict, io.BytesIO], None]) -> bytes:
    make(state(), file := io.BytesIO())
    return file.getvalue()


# Target: what makes its seeds in an empty folder.
TARGETS: dict[Callable[[bytes, Path], None], Callable[[Path], list[bytes]]] = {
    example: lambda _: [record(jpeg(), 1), tfrecord.encode_example({"a": [1.5], "b": [-1, 2**40], "c": []})],
    tfrecords: lambda _: [shard()],
    tfrecord_index: lambda folder: [f"0 {len(shard()) // 2}\n{len(shard()) // 2} {len(shard()) // 2}\n".encode()],
    tar: lambda _: tars(),
    tar_index: partial(indexes, Tars, samples(), "train-0.tar"),
    archive: lambda _: archives(),
    meta_mat: lambda _: synsets(),
    image: lambda _: images(),
    recipe: lambda _: recipe_seeds(),
    torch_file: lambda _: [
        saved(state()),
        saved(state()["weights"], _use_new_zipfile_serialization=False),
        written_by(checkpoint.write),
    ],
    torch_content: lambda _: pickled(),
    safetensors_file: lambda _: [
        safetensors({"fc.weight": torch.zeros(4, 4)}),
        safetensors({"fc.weight": torch.zeros(4, 4)}, metadata=exported()),
    ],
    idx: lambda _: [gzip.compress(bytes(100))],
    cifar: lambda _: batches(),
    dataset_json: lambda _: declared(),
    manifest_json: lambda _: manifests(),
}
