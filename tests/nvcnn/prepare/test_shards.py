"""A shard holds the same of its samples as TFRecords and as a tar."""

import json
import tarfile

import pytest

from nvcnn.prepare.blueprint import Sample, digest, read_sample
from nvcnn.prepare.encode import UnreadableImage
from tests.nvcnn.prepare.preparing import examples, opened, run


def test_webdataset_holds_the_same_images(prepared, tars):
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(tars.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    records = examples(prepared, "train")
    assert sorted(samples) == [f"{i:08d}" for i in range(len(records))]
    assert [(s["jpg"], int(s["cls"]) + 1) for _, s in sorted(samples.items())] == [
        (r["image/encoded"][0], r["image/class/label"][0]) for r in records
    ]
    declared = json.loads((tars / "dataset.json").read_text())
    assert declared == json.loads((prepared / "dataset.json").read_text()) | {"label_base": 0}


def test_max_side(folders, prepared, tmp_path):
    run(folders, tmp_path / "out", 2, max_side=48)
    for one, other in zip(examples(prepared, "*"), examples(tmp_path / "out", "*"), strict=True):
        assert one["image/class/label"] == other["image/class/label"]
        (data,), (made,) = one["image/encoded"], other["image/encoded"]
        assert (made == data) == (max(opened(data).size) <= 48)
        assert max(opened(made).size) <= 48


def test_another_pixel_is_another_source():
    black, grey = (digest([Sample("0.png", 0, pixels)]) for pixels in (bytes(784), bytes(783) + b"1"))
    assert black != grey


def test_a_source_that_vanishes_or_shrinks_is_a_bad_image(raw, tmp_path):
    with pytest.raises(UnreadableImage, match="No such file"):
        read_sample(Sample("gone.jpg", 0, str(tmp_path)))
    with pytest.raises(UnreadableImage, match="ends after 10 of 99 bytes"):
        read_sample(Sample("cut.jpg", 0, str(raw.train), raw.train.stat().st_size - 10, 99))
