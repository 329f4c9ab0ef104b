"""ImageNet is prepared from small archives of its structure, in several forms, and refused where a part is wrong."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from nvcnn.prepare import imagenet
from nvcnn.prepare.encode import Encoding
from nvcnn.prepare.verify import verify
from nvcnn.prepare.write import write_dataset
from nvcnn.program import InputError
from tests.nvcnn.prepare.preparing import contents, examples, opened
from tests.raw_imagenet import CLASSES, CMYK, DISGUISED, GREY, ROTATED, SYNSETS, Raw, tar_of

LABELS = {synset: i + 1 for i, synset in enumerate(sorted(list(SYNSETS)[:CLASSES]))}


def blueprint(raw: Raw, **changes):
    given = {"train": raw.train, "val": raw.val, "devkit": raw.devkit}
    how = {"encoding": Encoding(keep=("JPEG",)), "shards": (4, 2), "workers": 2}
    return imagenet.blueprint(**given | how | changes)


@pytest.fixture(scope="module")
def written(raw, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("written") / "imagenet"
    write_dataset(blueprint(raw), out, workers=2)
    return out


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(opened(data).convert("RGB"), dtype=np.int16)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_image_once_with_its_label(raw, written, split):
    stored = {}
    for example in examples(written, split):
        (encoded,), (label,), (text,) = (example.pop(f"image/{k}") for k in ("encoded", "class/label", "class/text"))
        assert example == {f"image/object/bbox/{side}": [] for side in ("xmin", "ymin", "xmax", "ymax")}
        assert encoded not in stored
        stored[encoded] = (label, text.decode())
        image = opened(encoded)
        assert (image.format, image.mode) in (("JPEG", "RGB"), ("JPEG", "L"))
    expected = {data: (LABELS[synset], SYNSETS[synset]) for data, synset in raw.images[split].values()}
    special = {raw.images["train"][name][0] for name in (CMYK, DISGUISED)} if split == "train" else set()
    assert len(stored) == len(expected)
    assert {data: expected[data] for data in expected.keys() - special} == {
        data: stored[data] for data in stored.keys() & expected.keys()
    }
    anew = [data for data in stored if data not in expected]
    assert len(anew) == len(special)
    for data in special:  # near to what Pillow shows of the original, with its label
        distance = {new: abs(rgb(new) - rgb(data)).mean() for new in anew if rgb(new).shape == rgb(data).shape}
        nearest = min(distance, key=distance.__getitem__)
        assert distance[nearest] < 3
        assert stored[nearest] == expected[data]
    if split == "train":
        assert {raw.images["train"][name][0] for name in (GREY, ROTATED)} <= stored.keys()  # copied as they are


def test_what_stands_beside_the_shards(raw, written):
    sorted_synsets = sorted(LABELS)
    assert (written / "synsets.txt").read_text().split() == sorted_synsets
    images = {split: len(raw.images[split]) for split in raw.images}
    assert json.loads((written / "dataset.json").read_text()) == {
        "num_classes": CLASSES,
        "label_base": 1,
        "class_names": [SYNSETS[synset] for synset in sorted_synsets],
        "images": images,
    }
    manifest = json.loads((written / "manifest.json").read_text())
    assert manifest["images"] == images
    assert sorted(manifest["shards"]) == sorted(path.name for path in written.glob("*-of-?????"))
    assert sum(part["encoded_anew"] for part in manifest["shards"].values()) == 2
    assert {path.name for path in written.iterdir()} == {
        *(name for shard in manifest["shards"] for name in (shard, f"{shard}.idx")),
        *("synsets.txt", "dataset.json", "manifest.json"),
    }


def test_synsets_are_verified_and_made_again(raw, written, tmp_path):
    out = shutil.copytree(written, tmp_path / "out")
    (out / "synsets.txt").write_text("n01440764\n")
    with pytest.raises(InputError, match=r"synsets\.txt: is missing, or not as it was written: prepare again"):
        verify(out, workers=1)
    write_dataset(blueprint(raw), out)
    assert contents(out) == contents(written)
    verify(out, workers=1)


@pytest.mark.parametrize(
    "how", ["kit directory", "synsets per image", "labels per image", "flat directory", "folders", "synsets"]
)
def test_other_forms_of_the_same_data_give_the_same_shards(raw, folders, written, tmp_path, how):
    images = sorted(raw.images["validation"].items())
    words, labels = tmp_path / "words.txt", tmp_path / "labels.txt"
    words.write_text("".join(f"{synset} {SYNSETS[synset]}\n" for synset in LABELS))
    changes = {"synsets": words}
    if how == "kit directory":
        with tarfile.open(raw.devkit) as tar:
            tar.extractall(tmp_path)
        changes = {"devkit": tmp_path / "ILSVRC2012_devkit_t12"}
    elif how in ("synsets per image", "labels per image"):
        labels.write_text("".join(f"{s if how[0] == 's' else LABELS[s]}\n" for _, (_, s) in images))
        changes |= {"devkit": None, "val_labels": labels}
    elif how == "flat directory":
        with tarfile.open(raw.val) as tar:
            tar.extractall(tmp_path / "val")
        (tmp_path / "val/._ILSVRC2012_val_00000001.JPEG").write_bytes(b"of macOS")
        (tmp_path / "val/.ipynb_checkpoints").mkdir()
        changes = {"val": tmp_path / "val"}
    elif how == "folders":
        changes |= {"train": folders[0], "val": folders[1], "devkit": None}
    write_dataset(blueprint(raw, **changes), tmp_path / "out")
    shards = [
        {name: data for name, data in contents(out).items() if "-of-" in name} for out in (tmp_path / "out", written)
    ]
    assert shards[0] == shards[1]


def test_synsets_decide_labels_and_their_own_names(raw, tmp_path):
    order = [*LABELS][::-1]
    (tmp_path / "synsets.txt").write_text("\n".join(order))
    write_dataset(blueprint(raw, synsets=tmp_path / "synsets.txt"), tmp_path / "out")
    by_text = {
        e["image/class/text"][0].decode(): e["image/class/label"][0] for e in examples(tmp_path / "out", "train")
    }
    assert by_text["tench, Tinca tinca"] == order.index("n01440764") + 1
    (tmp_path / "labels.txt").write_text("n01440764\n" * len(raw.images["validation"]))
    nameless = blueprint(raw, devkit=None, val_labels=tmp_path / "labels.txt")
    assert nameless.class_names == tuple(LABELS)


def test_a_part_of_imagenet_is_said_to_be_one(raw, capfd):
    blueprint(raw)
    assert "50 train images of 5 classes; the whole of ILSVRC2012 has 1281167 of 1000" in capfd.readouterr().err


def without_end(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])


def end_of(path: Path) -> int:
    """Returns how many bytes of zeros are behind the last member of a tar."""
    with tarfile.open(path) as tar:
        tar.getmembers()
        return path.stat().st_size - tar.offset


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def rewrite(path: Path, change) -> None:
    """Changes the names and contents of a tar's files."""
    with tarfile.open(path) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}
    path.write_bytes(tar_of(change(files)))


def kit_with(name: str, content: bytes | None):
    """Gives a file of the development kit another content, or removes it."""

    def change(files: dict[str, bytes]) -> dict[str, bytes]:
        other = {n: content if n.endswith(name) else data for n, data in files.items()}
        return {n: data for n, data in other.items() if data is not None}

    return lambda raw: rewrite(raw.devkit, change)


def fox_with(change):
    """Gives a class's tar another content, made of its own."""
    return lambda raw: rewrite(raw.train, lambda files: files | {FOX: change(files[FOX])})


FOX, TRUTH = "n02119789.tar", "ground_truth.txt"
DAMAGE = {
    "no train tar": (lambda raw: raw.train.unlink(), r"--train=.*train\.tar: cannot be read \(No such file"),
    "train is a named pipe": (lambda raw: pipe(raw.train), r"train\.tar: is a named pipe, not a file"),
    "val is a named pipe": (lambda raw: pipe(raw.val), r"val\.tar: is a named pipe, not a file"),
    "kit is a named pipe": (lambda raw: pipe(raw.devkit), r"gz: is a named pipe, not a file"),
    "train is no tar": (lambda raw: raw.train.write_bytes(b"x" * 5000), r"--train=.*cannot be read .*as it was down"),
    "train is empty": (lambda raw: raw.train.write_bytes(b""), r"--train=.*cannot be read .*empty"),
    "train cut in a class": (lambda raw: without_end(raw.train, 30_000), r"--train=.*(unexpected end|cut short)"),
    "train is the val tar": (lambda raw: raw.val.rename(raw.train), r"--train=.*holds ILSVRC2012_val_.*img_train\.tar"),
    "a class tar is empty": (fox_with(lambda tar: bytes(10240)), r"n02119789\.tar: holds no images"),
    "a class tar is cut": (fox_with(lambda tar: tar[:1024]), r"n02119789\.tar: .*n02119789_0\.JPEG is cut short"),
    "a header of a class tar": (
        fox_with(lambda tar: tar.replace(b"n02119789_1", b"n02119788_1", 1)),
        r"n02119789\.tar: cannot be read \(no tar header at byte \d+: bad checksum",
    ),
    "a header of train": (
        lambda raw: raw.train.write_bytes(raw.train.read_bytes().replace(FOX.encode(), b"n02119788.tar", 1)),
        r"--train=.*train\.tar: cannot be read \(no tar header at byte \d+: bad checksum",
    ),
    "train twice": (lambda raw: raw.train.write_bytes(raw.train.read_bytes() * 2), r"--train=.*: holds n.*\.tar twice"),
    "val without its end": (lambda raw: without_end(raw.val, end_of(raw.val)), r"--val=.* ends at byte \d+ without a"),
    "val cut": (lambda raw: without_end(raw.val, 12_000), r"--val=.*(unexpected end|cut short)"),
    "val has one image less": (
        lambda raw: rewrite(raw.val, lambda files: dict(list(files.items())[1:])),
        r"--devkit: labels 23 images, but --val=.* holds 22",
    ),
    "val has a copy, and one image less": (
        lambda raw: rewrite(
            raw.val, lambda files: {n.replace("20.JPEG", "03 (1).JPEG"): data for n, data in files.items()}
        ),
        r"--val=.*: ILSVRC2012_val_00000003 \(1\)\.JPEG does not end in a number.*: remove it",
    ),
    "val has a number twice": (
        lambda raw: rewrite(raw.val, lambda files: {n.replace("00000020", "3"): data for n, data in files.items()}),
        r"--val=.*: ILSVRC2012_val_00000003\.JPEG and ILSVRC2012_val_3\.JPEG have the same number",
    ),
    "val has a gap": (
        lambda raw: rewrite(raw.val, lambda files: {n.replace("00020", "00024"): data for n, data in files.items()}),
        r"--val=.*: no image has the number 20, which --devkit labels",
    ),
    "no kit": (lambda raw: raw.devkit.unlink(), r"--devkit=.*cannot be read \(No such file"),
    "kit cut": (lambda raw: without_end(raw.devkit, 300), r"--devkit=.*cannot be read"),
    "kit without meta": (kit_with("meta.mat", None), r"--devkit=.*has no meta\.mat"),
    "kit without truth": (kit_with(TRUTH, None), r"--devkit=.*has no ILSVRC2012_validation_ground_truth\.txt"),
    "meta damaged": (kit_with("meta.mat", b"MATLAB" * 40), r"--devkit=.*meta\.mat cannot be read"),
    "truth no numbers": (kit_with(TRUTH, b"1\ntwo\n"), r"--devkit=.*holds no numbers"),
    "truth unknown id": (kit_with(TRUTH, b"1\n900\n"), r"--devkit=.*no ILSVRC2012_ID 900"),
    "truth of a parent": (kit_with(TRUTH, b"6\n" * 23), r"--val=.*class of ILSVRC2012_val_00000001\.JPEG is not in"),
}


def test_two_kits_in_one_directory(raw, tmp_path):
    for name in ("devkit of 2011", "devkit of 2012"):
        with tarfile.open(raw.devkit) as tar:
            tar.extractall(tmp_path / name)
    with pytest.raises(InputError, match=r"--devkit=.*: holds .*2011/.*meta\.mat and .*2012/.*: give the"):
        blueprint(raw, devkit=tmp_path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_archives(raw, tmp_path, damage):
    archives = [shutil.copy(path, tmp_path) for path in (raw.train, raw.val, raw.devkit)]
    raw = Raw(*map(Path, archives), raw.images)
    spoil, what = DAMAGE[damage]
    spoil(raw)
    with pytest.raises(InputError, match=what) as error:
        blueprint(raw)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "text", "what"),
    [
        ("val_labels", "n01440764\n", r"labels 1 images, but --val=.* holds 23"),
        ("val_labels", "n01440764\n" * 22 + "n99999999", r"line 23 is 'n99999999', neither a synset"),
        ("val_labels", "0\n" * 23, r"line 1 is '0', neither .* from 1 to 5"),
        ("val_labels", "6\n" * 23, r"line 1 is '6'"),
        ("val_labels", "490\n361\n171\n822\n297\n1\n", r"order of ILSVRC2012_ID.*give --devkit"),
        ("val_labels", None, r"--val_labels=.*: cannot be read \(Is a directory\): give a text file"),
        ("synsets", None, r"--synsets=.*: cannot be read \(Is a directory\): give a text file"),
        ("synsets", "tench", "line 1 begins with tench"),
        ("synsets", "n01440764\nn01440764\n", "n01440764 twice"),
        ("synsets", "n01440764\n", r"--synsets=.*has no n02012849"),
        ("synsets", "\n".join([*LABELS, "n99999999"]), r"--train=.*has no n99999999"),
    ],
)
def test_wrong_lists(raw, tmp_path, flag, text, what):
    path = tmp_path / "list.txt"
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(InputError, match=what):
        blueprint(raw, **{"devkit": None if flag == "val_labels" else raw.devkit, flag: path})


def test_a_flat_val_needs_labels_and_not_the_ground_truth(raw, tmp_path):
    with pytest.raises(InputError, match=r"--val=.*not in class folders: give --devkit, or --val_labels"):
        blueprint(raw, devkit=None)
    path = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    path.write_text("1\n" * 23)
    with pytest.raises(InputError, match="give --devkit"):
        blueprint(raw, devkit=None, val_labels=path)


def test_a_flat_val_with_a_link_to_nowhere_or_unreadable(raw, tmp_path, monkeypatch):
    val = tmp_path / "val"
    val.mkdir()
    for name, (data, _) in raw.images["validation"].items():
        (val / name).write_bytes(data)
    pipe(val / name)
    with pytest.raises(InputError, match=rf"{name}: is a named pipe, not a file"):
        blueprint(raw, val=val)
    (val / name).unlink()
    (val / name).symlink_to("nowhere")
    with pytest.raises(InputError, match=rf"1 unreadable images.*{name}: cannot be read \(No such file"):
        write_dataset(blueprint(raw, val=val), tmp_path / "out")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)  # root may read everywhere
    with pytest.raises(InputError, match=r"--val=.*: cannot be listed \(Permission denied\)"):
        blueprint(raw, val=val)


def test_folders_that_are_not_imagenets(raw, tmp_path):
    for name in ("train/n02119789", "train/n01440764", "val/n99999999"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.JPEG").touch()
    folders = {"train": tmp_path / "train", "val": tmp_path / "val"}
    with pytest.raises(InputError, match=r"--val=.*class n99999999 is not in --train"):
        blueprint(raw, **folders)
    (tmp_path / "train/n02119789").rename(tmp_path / "train/fox")
    with pytest.raises(InputError, match=r"--train=.*fox is not a synset.*prepare\.py folder"):
        blueprint(raw, **folders)
