"""Class folders are searched for images, divided, and refused where they are no data set."""

import os

import pytest

from nvcnn.data.class_folders import class_names, open_class_folders
from nvcnn.prepare import folder
from nvcnn.prepare.encode import Encoding
from nvcnn.prepare.flags import parse, prepare
from nvcnn.prepare.write import write_dataset
from nvcnn.program import InputError
from tests.nvcnn.prepare.preparing import examples, opened
from tests.raw_imagenet import photograph
from tests.samples import file_of


@pytest.fixture
def train(tmp_path):
    """Writes two classes of 10 images in several formats, some in a folder `more`; one class is behind a link."""
    train = tmp_path / "train"
    for label, name in enumerate(("cat", "ant")):
        (train / name / "more").mkdir(parents=True)
        for i in range(10):
            kind, suffix = (("JPEG", "jpg"), ("PNG", "PNG"), ("BMP", "bmp"))[i % 3]
            path = train / name / ("more" if i % 2 else ".") / f"{i}.{suffix}"
            path.write_bytes(file_of(photograph(i + 50 * label, label), kind))
    (train / "cat" / "notes.txt").write_text("what a cat is")
    (train / "cat" / "._7.jpg").write_bytes(b"of macOS")
    (train / ".git").mkdir()
    (train / "ant").rename(tmp_path / "elsewhere")
    (train / "ant").symlink_to(tmp_path / "elsewhere")
    return train


def blueprint(train, **changes):
    return folder.blueprint(train, **{"encoding": Encoding()} | changes)


def test_classes_in_order_of_name(train, tmp_path, capfd):
    made = blueprint(train)
    assert made.class_names == ("ant", "cat")
    assert len(made.splits["train"]) == 20
    assert made.shards == {"train": 1}
    assert "1 files are left out, whose names are not those of images" in capfd.readouterr().err
    out = tmp_path / "out"
    write_dataset(made, out)
    kinds = ["JPEG"] * 7 + ["PNG"] * 3  # BMP becomes JPEG
    expected = [(name, label, kind) for label, name in ((1, "ant"), (2, "cat")) for kind in kinds]
    stored = [(e["image/class/text"], e["image/class/label"], e["image/encoded"]) for e in examples(out, "train")]
    assert sorted((text.decode(), label, opened(data).format) for ((text,), (label,), (data,)) in stored) == expected


def test_a_share_of_each_class(train, tmp_path):
    made = blueprint(train, val_share=0.3)
    for split, n in (("train", 7), ("validation", 3)):
        assert [sum(s.label == label for s in made.splits[split]) for label in (0, 1)] == [n, n]
    names = {split: {s.name for s in samples} for split, samples in made.splits.items()}
    assert not names["train"] & names["validation"]
    assert len(names["train"] | names["validation"]) == 20
    assert blueprint(train, val_share=0.3).splits == made.splits
    assert blueprint(train, val_share=0.3, seed=2).splits != made.splits


def test_what_will_not_work_without_validation(train, tmp_path, capfd):
    for n, flags in enumerate((["--val_share=0.3", "--shards=1,1"], ["--shards=1,1"])):
        prepare(parse(["folder", f"--train={train}", f"--out={tmp_path}/{n}", "--workers=1", *flags]))
        said = capfd.readouterr().err
        assert ("without --val or --val_share" in said) == (n == 1)
    assert "neither eval.py nor train.py --eval_every will work" in said


def test_validation_folders_have_the_classes_of_training(train, tmp_path):
    (tmp_path / "val" / "cat").mkdir(parents=True)
    (tmp_path / "val" / "cat" / "1.jpg").write_bytes(file_of(photograph(1, 1)))
    assert [s.label for s in blueprint(train, val=tmp_path / "val").splits["validation"]] == [1]
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "dog")
    with pytest.raises(InputError, match=r"--val=.*class dog is not in --train="):
        blueprint(train, val=tmp_path / "val")


def test_a_shard_for_each_128_mb(train, monkeypatch):
    monkeypatch.setattr(folder, "SHARD_BYTES", 20_000)
    made = blueprint(train, val_share=0.3)
    total = sum(sample.size for sample in made.splits["train"])
    assert made.shards["train"] == -(-total // 20_000) > 1


def test_what_is_no_data_set(train, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"--train=.*absent: No such file or directory: give a directory of class"):
        blueprint(tmp_path / "absent")
    with pytest.raises(InputError, match=r"--train=.*more: holds no class folders"):
        blueprint(train / "cat" / "more")
    (tmp_path / "above").mkdir()
    (tmp_path / "above" / "train").symlink_to(train)
    with pytest.raises(InputError, match=r"holds train, whose folders are the classes: give --train=.*/above/train$"):
        blueprint(tmp_path / "above")
    with pytest.raises(InputError, match=r"--val_share=0\.01: leaves no image"):
        blueprint(train, val_share=0.01)
    (train / "empty").mkdir()
    with pytest.raises(InputError, match=r"--train=.*train: empty holds no images"):
        blueprint(train)
    (train / "empty").rmdir()

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    scandir = os.scandir  # root may read everywhere
    os.mkfifo(train / "cat" / "p.jpg")
    with pytest.raises(InputError, match=r"cat/p\.jpg: is a named pipe, not a file"):
        blueprint(train)
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path) if str(path).endswith("more") else scandir(path))
    with pytest.raises(InputError, match=r"more: cannot be listed \(Permission denied\)"):
        blueprint(train)


@pytest.mark.parametrize(("to", "why"), [("nowhere", "No such file"), ("link.jpg", "Too many levels")])
def test_a_link_to_nowhere_or_to_itself_is_an_unreadable_image(train, tmp_path, to, why):
    (train / "cat" / "link.jpg").symlink_to(to)
    with pytest.raises(InputError, match=rf"1 unreadable images.*cat/link\.jpg: cannot be read \({why}"):
        write_dataset(blueprint(train), tmp_path / "out")


def test_a_class_that_is_a_link_to_itself(train):
    """A class may not be passed over as an image may."""
    (train / "dog").symlink_to("dog")
    with pytest.raises(InputError, match=r"--train=.*train/dog: Too many levels of symbolic links: give a directory"):
        blueprint(train)


@pytest.mark.parametrize(
    ("links", "named"),
    [
        ({"cat/more/loop": ".."}, "cat/more/loop"),
        ({"cat/loop": "../.."}, "cat/loop"),
        ({"ant/loop": "."}, "ant/loop"),  # ant is itself a link
        ({"all": "."}, "all"),
        ({"cat/more/x": "../../ant", "ant/y": "../train/cat"}, "ant/y/more/x"),  # each to the other
    ],
)
def test_a_link_to_a_folder_above(train, tmp_path, links, named):
    for link, to in links.items():
        (train / link).symlink_to(to)
    for list_images in (lambda: blueprint(train), lambda: open_class_folders(tmp_path, "train", class_names(train))):
        with pytest.raises(InputError, match=rf"train/{named}: links to a folder above it: remove it$"):
            list_images()


def test_two_links_to_a_folder_beside_them(train):
    for name in ("one", "two"):
        (train / "cat" / name).symlink_to("more")
    assert len(blueprint(train).splits["train"]) == 20 + 2 * 5
