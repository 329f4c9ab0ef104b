"""The benchmark as a whole, on a few tiny images; a peer that is not there has its row."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import data


def absent(material):
    raise ModuleNotFoundError("No module named 'absent'")


@pytest.fixture
def tiny(monkeypatch):
    for name, value in {"SIZE": 16, "BATCH": 4, "LONG": 40, "SHORT": 30, "SETTLE": 0, "MAX_SIDE": 32}.items():
        monkeypatch.setattr(data, name, value)
    for name in ("webdataset, PIL DataLoader", "tf.data", "ffcv", "libjpeg-turbo alone, whole images"):
        monkeypatch.setitem(data.CONTENDERS, name, ("absent", absent))


def photographs(directory, count=3):
    directory.mkdir()
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((320, 240)).save(directory / f"{n}.png")
    return directory


def test_it_runs_and_reports(tiny, tmp_path, monkeypatch, capsys):
    arguments = ["--files=24", "--rounds=2", "--batches=2", f"--json={tmp_path / 'data.json'}"]
    monkeypatch.setattr(sys, "argv", ["data", f"--photographs={photographs(tmp_path / 'photographs')}", *arguments])
    assert data.main() == 0
    assert capsys.readouterr().out.startswith("24 JPEGs, on average")
    written = json.loads((tmp_path / "data.json").read_text())
    rows = {row["name"].split(" / ")[1]: row for row in written["rows"]}
    assert list(rows) == ["a copy of the files", *list(data.CONTENDERS)[1:]]
    for name, row in rows.items():
        if data.CONTENDERS.get(name, ("", None))[1] is absent:
            assert row["ratio"] is None
            assert row["note"] == "ModuleNotFoundError: No module named 'absent'"
        else:
            assert row["ratio"] > 0
            assert row["unit"] == ("MB/s" if "copy" in name else "images/s")


def test_cuts_have_the_size_of_imagenets(tmp_path):
    """Sizes are 400 x 350 or a little more on average, most of them wider than high, and the same each time."""
    (directory,) = (photographs(tmp_path / "photographs", 1),)
    data.cut(directory / "0.png", tmp_path / "a", range(60))
    data.cut(directory / "0.png", tmp_path / "b", range(60))
    files = sorted((tmp_path / "a").iterdir())
    assert [f.read_bytes() for f in files] == [f.read_bytes() for f in sorted((tmp_path / "b").iterdir())]
    sizes = np.array([Image.open(f).size for f in files])
    assert (sizes.mean(0) > (380, 330)).all()
    assert (sizes.mean(0) < (470, 420)).all()
    assert (sizes[:, 0] > sizes[:, 1]).mean() > 0.5


def test_every_contender_hands_out_the_same_kind_of_batch(tiny, tmp_path):
    pytest.importorskip("torchvision")
    folders = tmp_path / "folders"
    data.cut_all(sorted(photographs(tmp_path / "photographs").iterdir()), folders, 24)
    material = data.Material(folders, data.prepared(folders, tmp_path / "records"), folders, folders)
    for name in (data.OURS, "nvcnn, --data_backend=torch", "torchvision, PIL DataLoader"):
        images = next(data.CONTENDERS[name][1](material))[0]
        assert images.numel() == 4 * 16 * 16 * 3
        assert images.dtype.itemsize == 1


def test_time_of_workers_counts(tmp_path):
    """A contender whose work is done by a process of its own is charged for it."""
    from multiprocessing import get_context

    def work(pipe):
        while pipe.recv():
            sum(range(3_000_000))
            pipe.send(True)

    ours, theirs = get_context("fork").Pipe()
    worker = get_context("fork").Process(target=work, args=(theirs,), daemon=True)
    worker.start()

    def batches():
        while True:
            ours.send(True)
            yield ours.recv()

    assert data.turn(batches(), 4) * data.BATCH > 10  # milliseconds a batch
    ours.send(False)
    worker.join()


def test_a_directory_without_photographs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data", f"--photographs={tmp_path}"])
    with pytest.raises(SystemExit, match="2"):
        data.main()
    assert "there are no images" in capsys.readouterr().err
