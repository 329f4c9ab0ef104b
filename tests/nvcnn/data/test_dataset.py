"""What find_dataset accepts, and one clear line for everything it does not."""

import json
import shutil

import pytest

from nvcnn.data.dataset import find_dataset
from nvcnn.data.shard_source import index_path
from nvcnn.data.tfrecord import encode_example
from nvcnn.program import InputError
from tests.samples import write_shard


@pytest.fixture
def directory(tmp_path, dataset):
    shutil.copytree(dataset.directory, tmp_path / "data")
    return tmp_path / "data"


def find(directory, num_classes=61, label_base=None, split="train"):
    return find_dataset(directory, num_classes=num_classes, label_base=label_base, split=split)


def declare(directory, **values):
    text = {"num_classes": 61, "label_base": 1, "class_names": None} | values
    (directory / "dataset.json").write_text(json.dumps(text))


def test_finds_shards_and_images(directory):
    found = find(directory)
    assert [p.name for p in found.source("train").shards] == [f"train-{i:05d}-of-00003" for i in range(3)]
    assert found.count("train") == found.count("validation") == 61
    assert (found.num_classes, found.label_base, found.class_names) == (61, 1, None)


def test_without_dataset_json_the_originals_labels(directory):
    found = find(directory, num_classes=None)
    assert (found.num_classes, found.label_base) == (1000, 1)


def test_dataset_json_decides(directory):
    declare(directory, class_names=[f"class {i}" for i in range(61)], images={"train": 61})
    found = find(directory, num_classes=None)
    assert (found.num_classes, found.label_base, found.class_names[60]) == (61, 1, "class 60")
    assert find(directory, num_classes=61, label_base=1) == found


@pytest.mark.parametrize(("flags", "name"), [({"num_classes": 62}, "num_classes"), ({"label_base": 0}, "label_base")])
def test_a_flag_against_dataset_json(directory, flags, name):
    declare(directory)
    with pytest.raises(InputError, match=rf"--{name}=.*dataset\.json says"):
        find(directory, **flags)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "cannot be read"),
        ("[]", "JSON object"),
        ("{}", "num_classes"),
        ('{"num_classes": 0, "label_base": 1}', "num_classes"),
        ('{"num_classes": true, "label_base": 1}', "num_classes"),
        ('{"num_classes": 61, "label_base": "1"}', "label_base"),
        ('{"num_classes": 61, "label_base": 1, "class_names": ["a"]}', "class_names"),
        ('{"num_classes": 61, "label_base": 1, "images": [61]}', "images"),
    ],
)
def test_a_broken_dataset_json(directory, text, what):
    (directory / "dataset.json").write_text(text)
    with pytest.raises(InputError, match=rf"dataset\.json: .*{what}"):
        find(directory)


def test_no_directory(tmp_path):
    with pytest.raises(InputError, match=r"--data_dir=.*nowhere: No such file or directory"):
        find(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--data_dir=.*file: Not a directory"):
        find(tmp_path / "file")


def test_an_empty_directory(tmp_path):
    with pytest.raises(InputError, match="is empty"):
        find(tmp_path)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_no_files_of_a_split(directory, split):
    for path in directory.glob(f"{split}-*"):
        path.unlink()
    with pytest.raises(InputError, match=rf"no {split}-\* files"):
        find(directory, split=split)


def test_files_without_images(tmp_path):
    write_shard(tmp_path / "train-0", iter([]))
    with pytest.raises(InputError, match="no images"):
        find(tmp_path)


def test_a_missing_shard(directory):
    declare(directory, images={"train": 61})
    (directory / "train-00001-of-00003").unlink()
    with pytest.raises(InputError, match=r"train images, but dataset\.json says 61"):
        find(directory)


def test_a_missing_index_is_built_and_said(directory, capfd):
    index = index_path(directory / "train-00001-of-00003")
    expected = index.read_bytes()
    index.unlink()
    find(directory)
    assert index.read_bytes() == expected
    assert "train-00001-of-00003: no index, building it" in capfd.readouterr().err


def test_a_missing_index_that_cannot_be_written(directory, monkeypatch):
    index_path(directory / "train-00001-of-00003").unlink()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("nvcnn.data.shard_source.atomic_writer", refuse)  # root may write everywhere
    with pytest.raises(InputError, match=r"idx: is missing and cannot be written \(Permission denied\)"):
        find(directory)


@pytest.mark.parametrize("cut", [1, 400])
def test_a_truncated_shard(directory, cut):
    shard = directory / "train-00002-of-00003"
    shard.write_bytes(shard.read_bytes()[:-cut])
    with pytest.raises(InputError, match=r"train-00002-of-00003\.idx: .*train-00002-of-00003 has .*truncated"):
        find(directory)
    index_path(shard).unlink()
    with pytest.raises(InputError, match=r"train-00002-of-00003: .*cut short"):
        find(directory)


def test_a_stale_index(directory):
    shutil.copy(directory / "train-00000-of-00003.idx", directory / "train-00001-of-00003.idx")
    with pytest.raises(InputError, match=r"train-00001-of-00003\.idx: ends at byte"):
        find(directory)


@pytest.mark.parametrize("text", ["0 10", "0\n", "zero ten\n", "-1 5\n", "\n"])
def test_a_garbled_index(directory, text):
    (directory / "train-00001-of-00003.idx").write_text(text)
    with pytest.raises(InputError, match=r"train-00001-of-00003\.idx: is not an index"):
        find(directory)


def test_a_file_that_is_no_tfrecord(directory):
    (directory / "train-notes.txt").write_text("a file like any other")
    with pytest.raises(InputError, match=r"train-notes\.txt: no TFRecord at byte 0"):
        find(directory)


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (b"not a message", "not a tf.train.Example"),
        (encode_example({"image/class/label": [1]}), "image/encoded"),
        (encode_example({"image/encoded": [b"png"], "image/class/label": []}), "image/class/label"),
    ],
)
def test_a_first_record_of_another_kind(directory, record, what):
    write_shard(directory / "train-00001-of-00003", iter([record]))
    with pytest.raises(InputError, match=rf"train-00001-of-00003: the record at byte 0 .*{what}"):
        find(directory)


@pytest.mark.parametrize(
    ("flags", "label"), [({"num_classes": 40}, 41), ({"label_base": 2}, 1), ({"num_classes": 20, "label_base": 0}, 21)]
)
def test_labels_outside_the_classes(directory, flags, label):
    with pytest.raises(InputError, match=rf"train-00.*: the record at byte \d+: label {label} is outside"):
        find(directory, **flags)
