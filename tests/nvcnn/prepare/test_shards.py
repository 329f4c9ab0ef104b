"""What a shard holds of its samples, as TFRecords and as a tar."""

import io
import json
import tarfile

import pytest
from PIL import Image

from nvcnn.data.shard_source import index_path
from nvcnn.data.tfrecord import decode_example, read_records
from nvcnn.prepare.blueprint import Sample, read_sample
from nvcnn.prepare.encode import UnreadableImage
from tests.nvcnn.prepare.preparing import run


def test_webdataset_holds_the_same_images(prepared, tars):
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(tars.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    records = [decode_example(r) for p in sorted(prepared.glob("train-*-of-00012")) for r in read_records(p)]
    assert sorted(samples) == [f"{i:08d}" for i in range(len(records))]
    assert [(s["jpg"], int(s["cls"]) + 1) for _, s in sorted(samples.items())] == [
        (r["image/encoded"][0], r["image/class/label"][0]) for r in records
    ]
    declared = json.loads((tars / "dataset.json").read_text())
    assert declared == json.loads((prepared / "dataset.json").read_text()) | {"label_base": 0}


def test_dali_reads_webdataset_by_our_index(prepared, tars):
    import nvidia.dali as dali

    paths = sorted(tars.glob("train-*.tar"))
    pipeline = dali.Pipeline(batch_size=10, num_threads=1, device_id=None)
    with pipeline:
        image, label = dali.fn.readers.webdataset(
            paths=[str(p) for p in paths], index_paths=[str(index_path(p)) for p in paths], ext=["jpg", "cls"]
        )
        pipeline.set_outputs(image, label)
    pipeline.build()
    images, labels = pipeline.run()
    records = [decode_example(r) for r in read_records(prepared / "train-00000-of-00012")]
    for i in range(10):
        assert images.at(i).tobytes() == records[i]["image/encoded"][0]
        assert int(labels.at(i).tobytes()) == records[i]["image/class/label"][0] - 1


def test_max_side(folders, prepared, tmp_path):
    run(folders, tmp_path / "out", 2, max_side=48)
    for before, after in zip(
        (r for p in sorted(prepared.glob("*-of-?????")) for r in read_records(p)),
        (r for p in sorted((tmp_path / "out").glob("*-of-?????")) for r in read_records(p)),
        strict=True,
    ):
        one, other = decode_example(before), decode_example(after)
        assert one["image/class/label"] == other["image/class/label"]
        (data,), (made,) = one["image/encoded"], other["image/encoded"]
        size, small = Image.open(io.BytesIO(data)).size, Image.open(io.BytesIO(made)).size
        assert (made == data) == (max(size) <= 48)
        assert max(small) <= 48


def test_a_source_that_vanishes_or_shrinks_is_a_bad_image(raw, folders, tmp_path):
    sample = Sample("gone.jpg", 0, str(tmp_path))
    with pytest.raises(UnreadableImage, match="No such file"):
        read_sample(sample)
    with pytest.raises(UnreadableImage, match="ends after 10 of 99 bytes"):
        read_sample(Sample("cut.jpg", 0, str(raw.train), raw.train.stat().st_size - 10, 99))
