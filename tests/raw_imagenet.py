"""Makes ImageNet's archives in small, of the exact structure: a tar of class tars, a flat tar, a development kit."""

import io
import itertools
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.samples import add, file_of

savemat = pytest.importorskip("scipy.io").savemat

# In the order of ILSVRC2012_ID, which is not that of labels; the last two are no classes but above them.
SYNSETS = {
    "n02119789": "kit fox, Vulpes macrotis",
    "n02100735": "English setter",
    "n01440764": "tench, Tinca tinca",
    "n03126707": "crane",
    "n02012849": "crane",
    "n00001740": "entity",
    "n02083346": "canine, canid",
}
CLASSES = 5
CMYK, DISGUISED, GREY, ROTATED = (f"n02100735/n02100735_{i}.JPEG" for i in (3, 5, 7, 9))  # what is not plain RGB


@dataclass
class Raw:
    """The archives, and of each split what is in them, as name -> (file, synset)."""

    train: Path
    val: Path
    devkit: Path
    images: dict[str, dict[str, tuple[bytes, str]]]


def photograph(seed: int, label: int) -> Image.Image:
    """Returns smooth noise of some size with a bright bar whose place is the label."""
    random = np.random.default_rng(seed)
    width, height = (int(n) for n in random.integers(40, 64, 2))
    small = Image.fromarray(random.integers(0, 120, (4, 4, 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC))
    pixels[height * (label + 1) // 8 : height * (label + 2) // 8] = 250
    return Image.fromarray(pixels)


def tar_of(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in files.items():
            add(tar, name, content)
    return data.getvalue()


def meta_mat() -> bytes:
    """Returns `synsets` as in the kit: a column of structures; children is a list for those that have some."""
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss")
    more = ("num_children", "children", "wordnet_height", "num_train_images")
    rows = np.zeros((len(SYNSETS), 1), dtype=[(name, "O") for name in fields + more])
    for i, (synset, words) in enumerate(SYNSETS.items()):
        children = [] if i < CLASSES else [1.0, 2.0]
        rows[i, 0] = (float(i + 1), synset, words, f"what {words} is", float(len(children)), children, 0.0, 1300.0)
    data = io.BytesIO()
    savemat(data, {"synsets": rows}, do_compression=True)
    return data.getvalue()


def make(
    directory: Path, *, per_class: int, val: int = 23, picture: Callable[[int, int], Image.Image] = photograph
) -> Raw:
    """Writes the archives; picture: of a seed and a label."""
    synsets = list(SYNSETS)[:CLASSES]
    label = {synset: i for i, synset in enumerate(sorted(synsets))}
    images: dict[str, dict[str, tuple[bytes, str]]] = {"train": {}, "validation": {}}
    for synset, i in itertools.product(synsets, range(per_class)):
        data = file_of(picture(100 * label[synset] + i, label[synset]))
        images["train"][f"{synset}/{synset}_{i}.JPEG"] = data, synset
    setter = label["n02100735"]
    for name, data in (
        (CMYK, file_of(picture(3, setter).convert("CMYK"))),
        (DISGUISED, file_of(picture(5, setter), kind="PNG")),
        (GREY, file_of(picture(7, setter).convert("L"))),
        (ROTATED, file_of(picture(9, setter).transpose(Image.Transpose.ROTATE_90), orientation=6)),
    ):
        images["train"][name] = data, "n02100735"
    ids = np.random.default_rng(1).integers(0, CLASSES, val).tolist()
    for i, number in enumerate(ids, 1):
        data = file_of(picture(1000 + i, label[synsets[number]]))
        images["validation"][f"ILSVRC2012_val_{i:08d}.JPEG"] = data, synsets[number]

    classes: dict[str, dict[str, bytes]] = {synset: {} for synset in synsets}
    for name, (data, synset) in images["train"].items():
        classes[synset][Path(name).name] = data
    train = tar_of({f"{synset}.tar": tar_of(files) for synset, files in classes.items()})
    # The real one is in no order of name either.
    flat = tar_of({name: data for name, (data, _) in sorted(images["validation"].items(), key=lambda item: item[1])})
    directory.mkdir(exist_ok=True)
    paths = [directory / f"ILSVRC2012_{name}" for name in ("img_train.tar", "img_val.tar", "devkit_t12.tar.gz")]
    paths[0].write_bytes(train)
    paths[1].write_bytes(flat)
    with tarfile.open(paths[2], "w:gz") as tar:
        root = "ILSVRC2012_devkit_t12"
        add(tar, f"{root}/readme.txt", b"Development Kit")
        add(tar, f"{root}/data/ILSVRC2012_validation_ground_truth.txt", "".join(f"{i + 1}\n" for i in ids).encode())
        add(tar, f"{root}/data/meta.mat", meta_mat())
    return Raw(*paths, images)


def unpack(raw: Raw, directory: Path) -> tuple[Path, Path]:
    """Writes the same images as class folders. Returns those of training and of validation."""
    for split, images in raw.images.items():
        for name, (data, synset) in images.items():
            path = directory / split / synset / Path(name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return directory / "train", directory / "validation"
