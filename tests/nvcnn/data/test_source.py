"""One contract for every kind of files and every backend: epochs, shares, resuming, evaluation, labels."""

import io
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from nvcnn.data.backend import choose_backend, open_evaluation, open_training
from nvcnn.data.dataset import find_dataset
from nvcnn.data.shard_source import index_path
from nvcnn.program import InputError
from tests.samples import add

CPU = torch.device("cpu")
KINDS = ("records", "tars", "folders")
BACKENDS = ("dali_cpu", "torch")
everywhere = pytest.mark.parametrize(
    ("kind", "backend"), [pair for pair in itertools.product(KINDS, BACKENDS) if pair != ("records", "dali_cpu")]
)  # what is left out is test_dali.py


def training(dataset, backend, **changes):
    if backend == "dali_cpu":
        pytest.importorskip("nvidia.dali")
    values = {"batch_size": 4, "image_size": 16, "crop_area": (0.3, 1.0), "crop_aspect": (0.8, 1.25), "seed": 1}
    values |= {"rank": 0, "ranks": 1, "device": CPU, "threads": 1}
    return open_training(dataset, backend, **values | changes)


def evaluation(dataset, backend, **changes):
    if backend == "dali_cpu":
        pytest.importorskip("nvidia.dali")
    values = {"batch_size": 7, "image_size": 28, "crop": 1.0, "rank": 0, "ranks": 1, "device": CPU, "threads": 1}
    return open_evaluation(dataset, backend, **values | changes)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@everywhere
def test_labels_belong_to_their_images(sources, encode, kind, backend):
    data = training(sources[kind], backend, image_size=28, crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0))
    assert (data.images, data.steps_per_epoch) == (61, 15)
    seen = []
    for images, labels, flip in itertools.islice(data, 15):
        assert images.shape == (4, 28, 28, 3)
        assert (images.dtype, labels.dtype, flip.dtype) == (torch.uint8, torch.int64, torch.bool)
        for image, label in zip(images, labels.tolist(), strict=True):
            assert np.array_equal(image.numpy(), np.asarray(Image.open(io.BytesIO(encode(label))).convert("RGB")))
            seen.append(label)
    assert len(set(seen)) == 60
    data.close()


@everywhere
@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 7), (2, 4), (3, 1), (3, 20), (5, 4)])
def test_an_epoch_has_no_image_twice(sources, kind, backend, ranks, batch_size):
    data = [training(sources[kind], backend, rank=r, ranks=ranks, batch_size=batch_size) for r in range(ranks)]
    steps = 61 // (batch_size * ranks)
    assert {d.steps_per_epoch for d in data} == {steps}
    orders, left_out = set(), set()
    for _ in range(3):
        seen = [label for _ in range(steps) for d in data for label in next(d).labels.tolist()]
        assert len(seen) == len(set(seen)) == steps * batch_size * ranks
        orders.add(tuple(seen))
        left_out.add(frozenset(range(61)) - frozenset(seen))
    assert len(orders) == 3
    assert len(left_out) > 1 or left_out == {frozenset()}
    for d in data:
        d.close()


@everywhere
def test_resuming_goes_on_bit_for_bit(sources, kind, backend):
    """At each batch around the end of an epoch, where readers shuffle anew."""
    make = {"rank": 1, "ranks": 2, "batch_size": 7, "threads": 2}
    data = training(sources[kind], backend, **make)
    assert data.steps_per_epoch == 4
    states, batches = [data.state_dict()], []
    for _ in range(12):
        batches.append(next(data))
        states.append(data.state_dict())
    assert sum(batch.flip.sum().item() for batch in batches) > 0
    for at in (0, 3, 4, 5, 7, 8):
        resumed = training(sources[kind], backend, state=states[at], **{**make, "threads": 1})
        for expected in batches[at : at + 4]:
            assert same(next(resumed), expected), at
        resumed.close()
    data.close()


@everywhere
@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 64])
def test_evaluation_has_each_image_once(sources, kind, backend, ranks):
    chosen = range(ranks) if ranks < 6 else (0, 1, 20, 21, 62, 63)
    parts = [evaluation(sources[kind], backend, rank=rank, ranks=ranks) for rank in chosen]
    batches = [batch for part in parts for batch in part]
    labels = [label for batch in batches for label in batch.labels.tolist()]
    assert len(labels) == len(set(labels)) == sum(part.images for part in parts)
    assert ranks > 5 or len(labels) == 61
    assert not any(batch.flip.any() for batch in batches)


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_of_10_000_images_at_batch_7_on_3_ranks(tmp_path, write, encode, backend):
    images = [encode(i, size=(8, 8)) for i in range(10)]
    write(tmp_path, "validation", images=10_000, encoded=lambda i: images[i % 10])
    found = find_dataset(tmp_path, num_classes=10_000, label_base=None, split="validation")
    parts = (evaluation(found, backend, rank=rank, ranks=3, image_size=8) for rank in range(3))
    labels = [label for part in parts for batch in part for label in batch.labels.tolist()]
    assert sorted(labels) == list(range(10_000))


def test_pillows_batches_are_the_same_on_any_number_of_ranks_and_workers(sources):
    """Of one total batch, image for image, crop for crop."""
    whole = training(sources["records"], "torch", batch_size=12)
    expected = [next(whole) for _ in range(7)]
    for ranks, threads in ((2, 1), (3, 2)):
        parts = [
            training(sources["records"], "torch", batch_size=12 // ranks, rank=r, ranks=ranks, threads=threads)
            for r in range(ranks)
        ]
        for batch in expected:
            assert same([torch.cat(t) for t in zip(*map(next, parts), strict=True)], batch)


@everywhere
def test_seeds_differ_in_order_and_crops(sources, kind, backend):
    def epoch(seed):
        data = training(sources[kind], backend, seed=seed, crop_area=(0.3, 0.9))
        return [torch.cat(parts) for parts in zip(*itertools.islice(data, 15), strict=True)]

    one, again, other = epoch(1), epoch(1), epoch(2)
    assert same(one, again)
    assert not torch.equal(one[1], other[1])
    crops = [{int(label): image for image, label in zip(*part[:2], strict=True)} for part in (one, other)]
    assert not any(torch.equal(crops[0][label], crops[1][label]) for label in crops[0].keys() & crops[1].keys())


def test_resuming_by_the_other_kind_of_reader(sources):
    state = training(sources["records"], "torch").state_dict()
    with pytest.raises(InputError, match=r"--data_backend: the run to resume .* by torch, this one by dali"):
        training(sources["records"], "dali_cpu", state=state)


# Which directories are a data set


def find(directory, split="train", **flags):
    return find_dataset(directory, **{"num_classes": None, "label_base": None} | flags, split=split)


def test_classes_are_the_folders_in_order_of_name(tmp_path, write_kind):
    for split in ("train", "val"):
        write_kind("folders", tmp_path, split, images=4, label=lambda i: 9 - i)
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
    with pytest.raises(InputError, match=r"--num_classes=5: .* has 4: leave the flag out"):
        find(tmp_path, num_classes=5)
    with pytest.raises(InputError, match=r"--label_base=1: .* has 0"):
        find(tmp_path, label_base=1)


def test_images_of_a_class_at_any_depth(tmp_path, write_kind):
    """As torchvision's ImageFolder and prepare.py folder have them."""
    first, second = write_kind("folders", tmp_path, "train", images=2)
    (first.parent / "deep" / "er").mkdir(parents=True)
    shutil.copy(second, first.parent / "deep" / "er" / "1.PNG")
    (second.parent / "link").symlink_to(first.parent / "deep")
    source = find(tmp_path).source("train")
    assert [(source.name(i).partition("/n0000")[2], source.read(i)[1]) for i in range(len(source))] == [
        ("0/deep/er/1.PNG", 0),
        ("0/image 0.png", 0),
        ("1/image 1.png", 1),
        ("1/link/er/1.PNG", 1),
    ]
    training(find(tmp_path), "dali_cpu").close()


@pytest.mark.parametrize(("from_", "absent"), [("train", "val"), ("val", "train")])
def test_training_and_validation_of_other_classes(tmp_path, write_kind, from_, absent):
    for split in ("train", "val"):
        write_kind("folders", tmp_path, split, images=4)
    shutil.copytree(tmp_path / from_ / "n00000", tmp_path / from_ / "n77777")
    with pytest.raises(InputError, match=rf"/{absent}: has no folder n77777, which .*/{from_} has \(1 such\)"):
        find(tmp_path)


def test_a_class_without_images(tmp_path, write_kind):
    write_kind("folders", tmp_path, "train", images=4)
    (tmp_path / "train/empty").mkdir()
    with pytest.raises(InputError, match=r"train/empty: holds no images"):
        find(tmp_path)
    with pytest.raises(InputError, match="no folder val or validation there"):
        find(tmp_path, split="validation")


def test_the_folder_of_the_classes_instead_of_the_one_above(tmp_path, write_kind):
    write_kind("folders", tmp_path, "train", images=4)
    with pytest.raises(InputError, match=r"no folder train/ there.*n00000 is a class, give the directory above train/"):
        find(tmp_path / "train")


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(KINDS, 2)))
def test_two_kinds_in_one_directory(tmp_path, write_kind, one, other):
    write_kind(one, tmp_path, "train", images=4)
    write_kind(other, tmp_path, "train", images=4)
    with pytest.raises(InputError, match=r"holds .* and .*: keep one kind in a directory"):
        find(tmp_path)


def test_a_dataset_json_against_the_folders(tmp_path, write_kind):
    write_kind("folders", tmp_path, "train", images=4)
    (tmp_path / "dataset.json").write_text(json.dumps({"num_classes": 5, "label_base": 0}))
    with pytest.raises(InputError, match=r"dataset\.json: num_classes is not that of the class folders"):
        find(tmp_path)


def test_tars_by_dataset_json_and_flags(tmp_path, write_kind):
    write_kind("tars", tmp_path, "train", images=9, label=lambda i: i)
    with pytest.raises(InputError, match=r"train-00000\.tar: folder\.x/000000\.png at byte 512: label 0 is outside 1"):
        find(tmp_path, num_classes=9)
    assert find(tmp_path, num_classes=9, label_base=0).count("train") == 9
    (tmp_path / "dataset.json").write_text(json.dumps({"num_classes": 9, "label_base": 0, "images": {"train": 9}}))
    assert (find(tmp_path).num_classes, find(tmp_path).label_base) == (9, 0)
    (tmp_path / "train-00001.tar").unlink()
    with pytest.raises(InputError, match=r"6 train images, but dataset\.json says 9"):
        find(tmp_path)


@pytest.mark.parametrize("suffix", ["JPG", "jpeg", "png"])
def test_tars_of_any_suffix(tmp_path, write_kind, suffix):
    write_kind("tars", tmp_path, "train", images=5, suffix=suffix)
    found = find(tmp_path)
    assert sorted(training(found, "dali_cpu", batch_size=5).__next__().labels.tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ({"a.jpg": b"x"}, "sample a has 1 images .* and 0 labels"),
        ({"a.cls": b"1"}, "sample a has 0 images .* and 1 labels"),
        ({"a.jpg": b"x", "a.png": b"x", "a.cls": b"1"}, "sample a has 2 images"),
        ({"a.jpg": b"x", "b.cls": b"1", "a.cls": b"1"}, "sample a has 1 images .* and 0 labels"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, r"a\.jpg at byte 512: its label 'cat' is not a number"),
    ],
)
def test_tars_without_one_image_and_one_label(tmp_path, members, what):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, data in members.items():
            add(tar, name, data)
    with pytest.raises(InputError, match=rf"train-0\.tar: {what}"):
        find(tmp_path)


def test_indexes_of_tars(tmp_path, write_kind, capfd):
    first, second, _ = write_kind("tars", tmp_path, "train", images=9)
    find(tmp_path)
    assert "train-00001.tar: no index, building it" in capfd.readouterr().err
    find(tmp_path)
    assert "index" not in capfd.readouterr().err
    good, data = index_path(second).read_text(), second.read_bytes()
    for text in ("", "v1.2 1\n", "v1.2 1\njpg 1 2 x\n", "v1.1 0\n"):
        index_path(second).write_text(text)
        with pytest.raises(InputError, match=r"train-00001\.tar\.idx: is not an index"):
            find(tmp_path)
    index_path(second).write_text(good)
    second.write_bytes(data[: int(good.split()[-7])])
    with pytest.raises(InputError, match=r"train-00001\.tar\.idx: ends at byte .* the shard is truncated"):
        find(tmp_path)
    index_path(second).unlink()
    with pytest.raises(InputError, match=r"train-00001\.tar: .*(cut short|damaged)"):
        find(tmp_path)
    second.write_bytes(b"this is no tar" * 100)
    with pytest.raises(InputError, match=r"train-00001\.tar: is not a tar, or is damaged"):
        find(tmp_path)
    shutil.copy(first, second)
    index_path(second).write_text(good.replace(" 1 folder", " 2 folder"))
    with pytest.raises(InputError, match=r"train-00001\.tar\.idx: is not that of .*train-00001\.tar"):
        find(tmp_path)


# Which backend


def test_the_backend_is_dalis_and_never_pillow_unasked(monkeypatch):
    pytest.importorskip("nvidia.dali")
    assert choose_backend(None, CPU) == "dali_cpu"
    assert choose_backend(None, torch.device("cuda")) == "dali_gpu"
    assert choose_backend("dali_cpu", torch.device("cuda")) == "dali_cpu"
    with pytest.raises(InputError, match="--data_backend=dali_gpu: there is no GPU here"):
        choose_backend("dali_gpu", CPU)
    monkeypatch.setattr("nvcnn.data.backend.find_spec", lambda name: None)
    assert choose_backend("torch", CPU) == "torch"
    for asked in (None, "dali_cpu"):
        with pytest.raises(InputError, match=r"needs NVIDIA DALI.*pip install nvcnn\[dali\].*--data_backend=torch"):
            choose_backend(asked, CPU)


def test_without_pillow(sources, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(InputError, match=r"pip install nvcnn\[images\]"):
        training(sources["records"], "torch")


def test_only_records_need_google_crc32c(sources, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "google_crc32c", None)
    for kind in ("tars", "folders"):
        with closing(training(sources[kind], "torch")) as data:
            next(data)
    with pytest.raises(InputError, match=r"google-crc32c: pip install nvcnn\[images\]"):
        find_dataset(sources["records"].directory, num_classes=61, label_base=None, split="train")


def test_a_program_that_does_not_close_its_data_ends(sources):
    """Its workers ignore the signal by which Python ends them at exit."""
    program = f"""
import multiprocessing
from nvcnn.data.dataset import find_dataset
from nvcnn.data.backend import open_training
import torch

multiprocessing.set_start_method("forkserver")  # the default of Python 3.14
dataset = find_dataset({str(sources["records"].directory)!r}, num_classes=61, label_base=None, split="train")
data = open_training(dataset, "torch", batch_size=4, image_size=16, crop_area=(0.3, 1.0), crop_aspect=(0.8, 1.25),
                     seed=1, rank=0, ranks=1, device=torch.device("cpu"), threads=2)
print(len(next(data).labels), flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "4\n"), ended.stderr
