"""find_dataset accepts what can be trained on, and has one clear line for everything else."""

import gzip
import io
import itertools
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from nvcnn.data.records import Records
from nvcnn.data.shard_source import index_path
from nvcnn.data.source import NoSplit
from nvcnn.data.tars import Tars
from nvcnn.data.tfrecord import encode_example
from nvcnn.program import InputError
from tests.nvcnn.data.reading import BACKENDS, WHOLE, epoch, find, joined, training
from tests.samples import IMAGES, WRITERS, add, picture, record, write_folders, write_shard, write_split, write_tars

FIRST, MIDDLE = "train-00000-of-00003", "train-00001-of-00003"  # the second is the shard that tests damage


@pytest.fixture
def directory(tmp_path, dataset):
    return shutil.copytree(dataset.directory, tmp_path / "data")


def declare(directory, **values):
    text = {"num_classes": IMAGES, "label_base": 1, "class_names": None} | values
    (directory / "dataset.json").write_text(json.dumps(text))


def test_finds_shards_and_images(directory):
    found = find(directory, num_classes=IMAGES)
    assert [p.name for p in found.source("train").shards] == [f"train-{i:05d}-of-00003" for i in range(3)]
    assert found.count("train") == found.count("validation") == IMAGES
    assert (found.num_classes, found.label_base, found.class_names) == (IMAGES, 1, None)


def test_without_dataset_json_the_originals_labels(directory):
    found = find(directory)
    assert (found.num_classes, found.label_base) == (1000, 1)


def test_dataset_json_decides(directory):
    declare(directory, class_names=[f"class {i}" for i in range(IMAGES)], images={"train": IMAGES})
    found = find(directory)
    assert (found.num_classes, found.label_base, found.class_names[60]) == (IMAGES, 1, "class 60")
    assert find(directory, num_classes=IMAGES, label_base=1) == found


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "cannot be read"),
        ("[]", "JSON object"),
        ("{}", "num_classes"),
        ('{"num_classes": 0, "label_base": 1}', "num_classes"),
        ('{"num_classes": true, "label_base": 1}', "num_classes"),
        ('{"num_classes": 10000001, "label_base": 1}', "num_classes must be an integer from 1 to 10000000"),
        ("[" * 100_000, "nested too deeply"),
        ('{"num_classes": 61, "label_base": "1"}', "label_base"),
        ('{"num_classes": 61, "label_base": 1, "class_names": ["a"]}', "class_names"),
        ('{"num_classes": 61, "label_base": 1, "images": [61]}', "images"),
    ],
)
def test_a_broken_dataset_json(dataset, tmp_path, text, what):
    shutil.copy(dataset.source("train").shards[0], tmp_path)
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=rf"dataset\.json: .*{what}"):
        find(tmp_path)


def delete(directory, pattern):
    for path in list(directory.glob(pattern)):
        path.unlink()


def cut(directory, size: int, index: bool = True):
    shard = directory / MIDDLE
    shard.write_bytes(shard.read_bytes()[:-size])
    if not index:
        index_path(shard).unlink()


def garbled(text):
    return (lambda d: index_path(d / MIDDLE).write_text(text)), rf"{MIDDLE}\.idx: is not an index"


def without_line(directory, line):
    index = index_path(directory / MIDDLE)
    lines = index.read_text().splitlines(keepends=True)
    del lines[line]
    index.write_text("".join(lines))


def repeated(directory):
    """The second record twice and the first not at all, of equal sizes: the end is right."""
    write_shard(directory / MIDDLE, [record(b"png", 1)] * 2)
    size = (directory / MIDDLE).stat().st_size // 2
    index_path(directory / MIDDLE).write_text(f"{size} {size}\n" * 2)


def compress(directory):
    (directory / MIDDLE).write_bytes(gzip.compress((directory / MIDDLE).read_bytes()))
    index_path(directory / MIDDLE).unlink()


def first(record, what):
    return (lambda d: write_shard(d / MIDDLE, [record])), rf"{MIDDLE}: the record at byte 0:? .*{what}"


def outside(label, **flags):
    return (lambda d: None), rf"train-00.*: the record at byte \d+: label {label} is outside", flags


PARTLY = rf"{MIDDLE}\.idx: is not all of"


def pipe(name):
    """Puts a named pipe there, at which a reader would wait for ever."""

    def put(directory):
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return put, rf"{name}: is a named pipe, not a file: remove it"


REFUSED = {  # what is done to a directory of TFRecords, the words of the message, and the flags, if any
    "num_classes against dataset.json": (declare, r"--num_classes=.*dataset\.json says", {"num_classes": 62}),
    "label_base against dataset.json": (declare, r"--label_base=.*dataset\.json says", {"label_base": 0}),
    "no such directory": (shutil.rmtree, r"--data_dir=.*data: No such file or directory"),
    "a file": (lambda d: (shutil.rmtree(d), d.touch()), r"--data_dir=.*data: Not a directory"),
    "empty": (lambda d: delete(d, "*"), "is empty"),
    "no training files": (lambda d: delete(d, "train-*"), r"no train-\* files"),
    "no validation files": (
        lambda d: delete(d, "val*"),
        r"no val-\*-of-\* or .* or test-.* files",
        {"split": "validation"},
    ),
    "no images": (lambda d: (delete(d, "*"), write_shard(d / "train-0", [])), "no images"),
    "a missing shard": (
        lambda d: (declare(d, images={"train": IMAGES}), (d / MIDDLE).unlink()),
        r"41 train images, but dataset\.json says 61",
    ),
    "cut in a record's end": (lambda d: cut(d, 1), rf"{MIDDLE}\.idx: .*{MIDDLE} has .*truncated"),
    "cut before a record": (lambda d: cut(d, 400), rf"{MIDDLE}\.idx: .*{MIDDLE} has .*truncated"),
    "cut, without an index": (lambda d: cut(d, 400, index=False), rf"{MIDDLE}: .*cut short"),
    "another index": (
        lambda d: shutil.copy(index_path(d / FIRST), index_path(d / MIDDLE)),
        rf"{MIDDLE}.*: ends at byte",
    ),
    "an index that ends before its shard": (lambda d: without_line(d, -1), PARTLY),
    "an index without a line in the middle": (lambda d: without_line(d, 5), PARTLY),
    "an index without a line, samples may be left out": (lambda d: without_line(d, 5), PARTLY, {"lenient": True}),
    "an index with a line twice": (repeated, PARTLY),
    "an index without its first line": (lambda d: without_line(d, 0), PARTLY),
    "an index without its last, samples may be left out": (lambda d: without_line(d, -1), PARTLY, {"lenient": True}),
    "an index without its last line's end": garbled("0 10"),
    "an index of one number": garbled("0\n"),
    "an index of words": garbled("zero ten\n"),
    "an index with a sign": garbled("-1 5\n"),
    "an index with an empty line": garbled("\n"),
    "a named pipe for a shard": pipe(FIRST),
    "a named pipe for an index": pipe(f"{FIRST}.idx"),
    "a named pipe for dataset.json": pipe("dataset.json"),
    "no TFRecord": (lambda d: (d / "train-x").write_text("a file like any other"), "train-x: no TFRecord at byte 0"),
    "no tf.train.Example": first(b"not a message", "not a tf.train.Example"),
    "no image": first(encode_example({"image/class/label": [1]}), "image/encoded"),
    "no label": first(encode_example({"image/encoded": [b"png"]}), "it has no number as its label"),
    "compressed": (compress, rf"{MIDDLE}: is compressed by gzip: unpack it"),
    "compressed, by name": (
        lambda d: (d / MIDDLE).rename(d / "train-00001.tar.gz"),
        r"train-00001\.tar\.gz is compressed: unpack it",
    ),
    "two sets to validate on": (
        lambda d: (d / "val-0.tfrecord").touch(),
        r"holds val-0\.tfrecord and validation-00000-of-00003, two sets to validate on",
    ),
    "a label above": outside(41, num_classes=40),
    "a label below": outside(1, label_base=2),
    "a label above, from zero on": outside(21, num_classes=20, label_base=0),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_one_line(directory, case):
    damage, words, *flags = REFUSED[case]
    damage(directory)
    with pytest.raises(InputError, match=words) as error:
        find(directory, **dict(*flags))
    assert "\n" not in str(error.value)


def test_a_missing_index_is_built_and_said(directory, capfd, monkeypatch):
    index = index_path(directory / MIDDLE)
    expected = index.read_bytes()
    index.unlink()
    find(directory)
    assert index.read_bytes() == expected
    assert f"{MIDDLE}: no index, building it" in capfd.readouterr().err
    find(directory)
    assert "index" not in capfd.readouterr().err
    index.unlink()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nvcnn.data.shard_source.atomic_writer", refuse)  # root may write everywhere
    with pytest.raises(InputError, match=r"idx: is missing and cannot be written \(Permission denied\)"):
        find(directory)


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(WRITERS, 2)))
def test_two_kinds_in_one_directory(tmp_path, one, other):
    for kind in (one, other):
        WRITERS[kind](tmp_path, "train", images=3)
    with pytest.raises(InputError, match=r"holds .* and .*: keep one kind in a directory"):
        find(tmp_path)


# Class folders


def test_classes_are_the_folders_in_order_of_name(tmp_path):
    for split in ("train", "val"):
        write_folders(tmp_path, split, images=4, label=lambda i: 9 - i)
    (tmp_path / "train/n00006/notes.txt").touch()  # no image, no class
    (tmp_path / "train/.hidden").mkdir()
    found = find(tmp_path)
    assert (found.num_classes, found.label_base, found.count("train")) == (4, 0, 4)
    assert found.class_names == ("n00006", "n00007", "n00008", "n00009")
    source = found.source("train")
    assert [(source.name(i).rpartition("/")[2], source.read(i)[1]) for i in range(4)] == [
        (f"image {3 - i}.png", i) for i in range(4)
    ]
    assert find(tmp_path, num_classes=4).num_classes == 4


def test_images_of_a_class_at_any_depth(tmp_path):
    """torchvision's ImageFolder and `prepare.py folder` find the same images."""
    one, other = write_folders(tmp_path, "train", images=2)
    (one.parent / "deep" / "er").mkdir(parents=True)
    shutil.copy(other, one.parent / "deep" / "er" / "1.PNG")
    (other.parent / "link").symlink_to(one.parent / "deep")
    source = find(tmp_path).source("train")
    assert [(source.name(i).partition("/n0000")[2], source.read(i)[1]) for i in range(len(source))] == [
        ("0/deep/er/1.PNG", 0),
        ("0/image 0.png", 0),
        ("1/image 1.png", 1),
        ("1/link/er/1.PNG", 1),
    ]
    training(find(tmp_path)).close()


def more_classes(here, there):
    words = rf"/{there}: has no folder n77777, which .*/{here} has \(1 such\)"
    return (lambda d: shutil.copytree(d / here / "n00000", d / here / "n77777")), words


FOLDERS_REFUSED = {  # what is done to train/ and val/ of two classes, the words of the message, and the flags, if any
    "more classes in training": more_classes("train", "val"),
    "more classes in validation": more_classes("val", "train"),
    "other num_classes": (lambda d: None, r"--num_classes=5: .* has 2: leave the flag out", {"num_classes": 5}),
    "other label_base": (lambda d: None, r"--label_base=1: .* has 0", {"label_base": 1}),
    "other dataset.json": (declare, r"dataset\.json: num_classes is not that of the class folders"),
    "a named pipe among images": pipe("train/n00001/p.jpg"),
    "a link to a device among images": (
        lambda d: (d / "train/n00001/p.jpg").symlink_to("/dev/zero"),
        r"train/n00001/p\.jpg: is a device, not a file",
    ),
    "a class without images": (
        lambda d: [(d / split / "empty").mkdir() for split in ("train", "val")],
        r"train/empty: holds no images",
    ),
    "two sets to validate on": (
        lambda d: shutil.copytree(d / "val", d / "validation"),
        "holds val/ and validation/, two",
    ),
    "no validation": (
        lambda d: shutil.rmtree(d / "val"),
        r"no folder val or validation or valid or test there, with the classes of train/: set a tenth of each class "
        r"aside by `python launch/prepare\.py folder --train=(.*)/train --val_share=0\.1 --out=\1-prepared`",
        {"split": "validation"},
    ),
    "validation alone": (lambda d: shutil.rmtree(d / "train"), "no folder train there: prepare"),
    "a set to test on with other classes": (
        lambda d: ((d / "val").rename(d / "test"), (d / "test/n00000").rename(d / "test/all")),
        "no folder val or validation",
        {"split": "validation"},
    ),
}


@pytest.mark.parametrize("case", FOLDERS_REFUSED)
def test_refuses_class_folders_in_one_line(tmp_path, case):
    damage, words, *flags = FOLDERS_REFUSED[case]
    for split in ("train", "val"):
        write_folders(tmp_path, split, images=2)
    damage(tmp_path)
    with pytest.raises(InputError, match=words):
        find(tmp_path, **dict(*flags))


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test"])
def test_what_is_validated_on_by_its_name(tmp_path, name):
    write_folders(tmp_path / "folders", "train", images=2)
    write_folders(tmp_path / "folders", name, images=6, label=lambda i: i % 2)
    for kind in ("tars", "records"):
        for split, images in (("train", 2), (name, 6)):
            WRITERS[kind](tmp_path / kind, split, images=images)
    for kind in WRITERS:
        assert find(tmp_path / kind, "train").count("train") == 2
        assert find(tmp_path / kind, "validation").count("validation") == 6


def test_files_beside_shards_are_none(tmp_path):
    write_split(tmp_path, "valid", images=2, shards=2)  # what eval.py needs, alone
    for name in ("val-notes.md", "valid-notes.md", "test-notes.md"):
        (tmp_path / name).write_text("a file like any other")
    assert find(tmp_path, "validation").count("validation") == 2
    for shard in tmp_path.glob("valid-*-of-*"):
        shard.rename(tmp_path / shard.name.replace("valid", "test"))
    assert find(tmp_path, "validation").count("validation") == 2
    write_split(tmp_path, "train", images=3, shards=1)
    delete(tmp_path, "test-0*")
    with pytest.raises(NoSplit, match=r"no val-\*-of-\* or val-\*\.tfrecord or validation-\* or"):
        find(tmp_path, "validation")


def test_a_set_to_test_on_beside_one_to_validate_on(tmp_path):
    """It may well be without labels, and is not looked at."""
    for split, images in (("train", 2), ("valid", 4)):
        write_folders(tmp_path, split, images=images, label=lambda i: i % 2)
    write_folders(tmp_path, "test", images=6, label=lambda i: 7)
    assert find(tmp_path, "validation").count("validation") == 4
    shutil.rmtree(tmp_path / "valid")
    assert find(tmp_path).count("train") == 2
    shutil.rmtree(tmp_path / "train")
    assert find(tmp_path, "validation").class_names == ("n00007",)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", r"give --data_dir=.*/photos$"),
        ("flat", r"if its folders are classes, set a tenth .* --train=(.*) --val_share=0\.1 --out=\1-prepared`"),
        ("photos/train", r"n00000 is most likely a class, give the directory above train/"),
        ("flat/n00000", r"put the images of each class into a folder, as train/CLASS and val/CLASS"),
        ("other", r"prepare the data set, or correct the path"),
    ],
)
def test_a_directory_that_is_no_data_set(tmp_path, given, words):
    write_folders(tmp_path / "photos", "train", images=2)
    write_folders(tmp_path, "flat", images=2)
    write_folders(tmp_path, "other", images=1, name="a/b/c")
    with pytest.raises(InputError, match=f"no folder train/ there: {words}"):
        find(tmp_path / given)


# WebDataset's tars


def test_tars_by_dataset_json_and_flags(tmp_path):
    write_tars(tmp_path, "train", images=9, label=lambda i: i)
    with pytest.raises(InputError, match=r"train-00000\.tar: folder\.x/000000\.png at byte 512: label 0 is outside 1"):
        find(tmp_path, num_classes=9)
    assert find(tmp_path, num_classes=9, label_base=0).count("train") == 9
    declare(tmp_path, num_classes=9, label_base=0, images={"train": 9})
    assert (find(tmp_path).num_classes, find(tmp_path).label_base) == (9, 0)


@pytest.mark.parametrize("suffix", ["JPG", "jpeg", "png", "webp"])
def test_tars_of_any_suffix(tmp_path, suffix):
    write_tars(tmp_path, "train", images=5, suffix=suffix)
    assert sorted(next(training(find(tmp_path), batch_size=5)).labels.tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ({"a.jpg": b"x"}, "sample a has 1 images .* and 0 labels"),
        ({"a.cls": b"1"}, "sample a has 0 images .* and 1 labels"),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"1"}, "sample a has 2 images"),
        ({"a.jpg": b"x", "b.cls": b"1", "a.cls": b"1"}, "sample a has 1 images .* and 0 labels"),
        ({"a.gif": b"x", "a.cls": b"1"}, "sample a has 0 images .* and 1 labels"),
        ({"a.jpg": b"x", "a.cls": b""}, r"a\.jpg at byte 512: it has no number as its label"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, r"a\.jpg at byte 512: its label 'cat' is not a number"),
    ],
)
def test_tars_without_one_image_and_one_label(tmp_path, members, what):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    with pytest.raises(InputError, match=rf"train-0\.tar: {what}"):
        find(tmp_path)


def test_indexes_of_tars(tmp_path):
    one, other, _ = write_tars(tmp_path, "train", images=9)
    find(tmp_path)
    good, data = index_path(other).read_text(), other.read_bytes()
    for text in ("", "v1.2 1\n", "v1.2 1\njpg 1 2 x\n", "v1.1 0\n"):
        index_path(other).write_text(text)
        with pytest.raises(InputError, match=r"train-00001\.tar\.idx: is not an index"):
            find(tmp_path)
    index_path(other).write_text(good)
    other.write_bytes(data[: int(good.split()[-7])])
    with pytest.raises(InputError, match=r"train-00001\.tar\.idx: ends at byte .* the shard is truncated"):
        find(tmp_path)
    index_path(other).unlink()
    with pytest.raises(InputError, match=r"train-00001\.tar: cannot be read \(.*png is cut short"):
        find(tmp_path)
    other.write_bytes(b"this is no tar" * 100)
    with pytest.raises(InputError, match=r"train-00001\.tar: cannot be read \(no tar header at byte 0: "):
        find(tmp_path)
    shutil.copy(one, other)
    index_path(other).write_text(good.replace(" 1 folder", " 2 folder"))
    with pytest.raises(InputError, match=r"train-00001\.tar\.idx: is not that of .*train-00001\.tar"):
        find(tmp_path)


@pytest.mark.parametrize("others", [(), ("json",)])
@pytest.mark.parametrize("lenient", [False, True])
def test_an_index_of_a_tar_accounts_for_every_sample(tmp_path, others, lenient):
    """The others are large enough to be another sample, so their headers are looked at."""
    (shard,) = write_tars(tmp_path, "train", images=6, shards=1, others=others, other=b"{}" * 2000)
    assert find(tmp_path, lenient=lenient).count("train") == 6
    index = index_path(shard)
    lines = index.read_text().splitlines()[1:]
    for kept in ([], lines[:3], lines[1:], lines[:2] + lines[3:], lines[:4] + lines[5:]):
        index.write_text(Tars.index_text(kept))
        with pytest.raises(InputError, match=r"train-00000\.tar\.idx: is not that of .* from byte \d+ on: delete it"):
            find(tmp_path, lenient=lenient)
    index.unlink()
    assert find(tmp_path, lenient=lenient).count("train") == 6


@pytest.mark.parametrize("kind", ["records", "tars"])
def test_a_shard_that_grows_while_its_index_is_made(tmp_path, monkeypatch, kind):
    shard, *_ = WRITERS[kind](tmp_path, "train")
    index_path(shard).unlink(missing_ok=True)
    source = Tars if kind == "tars" else Records
    monkeypatch.setattr(source, "scan", lambda path: path.write_bytes(path.read_bytes() * 2) and [])
    with pytest.raises(InputError, match=rf"{shard}: has changed while its index was made"):
        find(tmp_path)
    assert not index_path(shard).exists()


@pytest.mark.parametrize("kind", ["records", "tars"])
def test_a_shard_without_samples(tmp_path, kind):
    """A writer of shards leaves an empty one at the end; and of another all samples may be left out."""
    suffix = WRITERS[kind](tmp_path, "train", images=9)[0].suffix
    WRITERS[kind](tmp_path / "empty", "train", images=0, shards=1)[0].rename(tmp_path / f"train-9{suffix}")
    found = find(tmp_path).without("train", range(3))
    for backend in BACKENDS:
        data = training(found, backend, batch_size=6)
        assert sorted(next(data).labels.tolist()) == [3, 4, 5, 6, 7, 8]
        data.close()


def test_what_is_no_sample_is_passed_over(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name in ("README", "a/LICENSE.txt", "a/1.jpg", "a/1.txt", "a/1.cls", "a/._1.jpg", "a/2.json"):
            add(tar, name, b"1")
    found = find(tmp_path).source("train")
    assert (len(found), found.read(0)) == (1, (b"1", 1))
    with tarfile.open(tmp_path / "train-1.tar", "w") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "a/1.jpg"
        tar.addfile(link)
    with pytest.raises(InputError, match=r"train-1\.tar: cannot be read \(b\.jpg is a link"):
        find(tmp_path)


@pytest.mark.parametrize("kind", ["tars", "folders"])
def test_names_that_are_not_utf_8(tmp_path, kind):
    """A tar's index takes them as far as it can; DALI, which does not take them as names of files, gets links."""
    name = "{:06d}\udcff" if kind == "tars" else "n{1:05d}/image {0}\udcff"
    WRITERS[kind](tmp_path / "data", "train", IMAGES, name=name)
    found = find(tmp_path / "data", num_classes=None if kind == "folders" else IMAGES)
    assert {int(label) for label in joined(epoch(training(found, "torch"))).labels} <= set(range(IMAGES))
    images = {}
    for batch in epoch(training(found, image_size=28, **WHOLE)):
        images |= dict(zip(batch.labels.tolist(), batch.images, strict=True))
    assert len(images) == 60
    for label, image in images.items():
        assert np.array_equal(image, Image.open(io.BytesIO(picture(label))).convert("RGB"))
    if kind == "folders":
        (tmp_path / "data/train/n00007/image 7\udcff.png").write_bytes(picture(7)[:60])
        with pytest.raises(InputError, match=r"train/n00007/image 7\udcff\.png: the image cannot be decoded"):
            epoch(training(found, batch_size=IMAGES))


def test_a_path_that_is_not_utf_8(directory):
    with pytest.raises(InputError, match="DALI takes names in UTF-8 alone"):
        training(find(directory.rename(directory.with_name("data\udcff")), num_classes=IMAGES))
