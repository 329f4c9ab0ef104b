"""Fashion-MNIST is prepared from small files of the same format, which come from several places."""

import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nvcnn.prepare import fashion_mnist
from nvcnn.program import InputError
from tests.nvcnn.data.reading import evaluation, find
from tests.nvcnn.prepare.preparing import contents, examples, opened

ROOT = Path(__file__).parents[3]
IMAGES = {"train": 43, "t10k": 11}


def pixels(prefix: str) -> np.ndarray:
    return np.random.default_rng(len(prefix)).integers(0, 256, (IMAGES[prefix], 28, 28), dtype=np.uint8)


def labels(prefix: str) -> np.ndarray:
    return np.random.default_rng(len(prefix) + 9).integers(0, 10, IMAGES[prefix], dtype=np.uint8)


def idx(name: str) -> bytes:
    prefix, what, *_ = name.split("-")
    if what == "images":
        return struct.pack(">4I", 2051, IMAGES[prefix], 28, 28) + pixels(prefix).tobytes()
    return struct.pack(">2I", 2049, IMAGES[prefix]) + labels(prefix).tobytes()


FILES = {name: idx(name) for name in fashion_mnist.SHA256}


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """Returns a directory of four small IDX files, taken for the real ones; no other source is there."""
    directory = tmp_path / "source"
    directory.mkdir()
    for name, data in FILES.items():
        (directory / f"{name}.gz").write_bytes(gzip.compress(data))
        monkeypatch.setitem(fashion_mnist.SHA256, name, hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(fashion_mnist, "INSTALLED", tmp_path / "not installed")
    monkeypatch.setattr(fashion_mnist, "ADDRESS", (tmp_path / "not there").as_uri())
    monkeypatch.setenv("PATH", "")
    return directory


def test_writes_every_image_once_with_its_features(tmp_path, source, main):
    out = tmp_path / "deep" / "out"
    assert main(["fashion-mnist", f"--out={out}", f"--source={source}", "--workers=2"]) == 0
    assert len(list(out.iterdir())) == 2 * (8 + 2) + 2
    assert json.loads((out / "dataset.json").read_text()) == {
        "num_classes": 10,
        "label_base": 1,
        "class_names": list(fashion_mnist.CLASS_NAMES),
        "images": {"train": 43, "validation": 11},
    }
    for split, prefix in (("train", "train"), ("validation", "t10k")):
        seen = []
        for example in examples(out, split):
            (encoded,), (label,) = example.pop("image/encoded"), example.pop("image/class/label")
            assert example == {
                "image/class/text": [fashion_mnist.CLASS_NAMES[label - 1].encode()],
                **{f"image/object/bbox/{side}": [] for side in ("xmin", "ymin", "xmax", "ymax")},
            }
            image = opened(encoded)
            assert (image.format, image.mode) == ("PNG", "L")
            seen.append((image.tobytes(), label - 1))
        expected = [(image.tobytes(), label) for image, label in zip(pixels(prefix), labels(prefix), strict=True)]
        assert sorted(seen) == sorted(expected)
        assert seen != expected  # shuffled


@pytest.mark.parametrize("file_format", ["tfrecord", "webdataset"])
def test_dali_reads_it(tmp_path, source, device, file_format):
    fashion_mnist.fetch_and_write(tmp_path / "out", source, file_format=file_format)
    (batch,) = evaluation(find(tmp_path / "out", "validation"), batch_size=50, device=device)
    seen = zip(batch.images.cpu().numpy(), batch.labels.tolist(), strict=True)
    expected = zip(pixels("t10k"), labels("t10k"), strict=True)
    assert sorted((image[..., 2].tobytes(), label) for image, label in seen) == sorted(
        (image.tobytes(), label) for image, label in expected
    )


def test_up_to_date_costs_nothing(tmp_path, source, capfd):
    fashion_mnist.fetch_and_write(tmp_path / "out", source)
    before = contents(tmp_path / "out")
    capfd.readouterr()
    fashion_mnist.fetch_and_write(tmp_path / "out", tmp_path / "no source is needed")
    assert capfd.readouterr().out == f"Fashion-MNIST in {tmp_path / 'out'} is complete\n"
    (tmp_path / "out" / "train-00003-of-00008.idx").unlink()
    fashion_mnist.fetch_and_write(tmp_path / "out", source)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_a_source_that_is_not_fashion_mnist(tmp_path, source, damage):
    path = source / "t10k-labels-idx1-ubyte.gz"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if damage == "cut" else gzip.compress(b"MNIST"))
    what = "SHA-256 differs" if damage == "other" else "cannot be read"
    with pytest.raises(InputError, match=rf"t10k-labels-idx1-ubyte\.gz: .*{what}"):
        fashion_mnist.fetch_and_write(tmp_path / "out", source)
    assert not contents(tmp_path / "out")


# Where the files come from


def test_the_installed_package_is_used(source, monkeypatch, capfd):
    monkeypatch.setattr(fashion_mnist, "INSTALLED", source)
    assert fashion_mnist.read_source(None) == FILES
    assert f"from {source}" in capfd.readouterr().out


@pytest.mark.parametrize("lists", [True, False])
def test_debians_package_is_downloaded(tmp_path, source, monkeypatch, lists):
    """The apt-get and dpkg here behave as Debian's; without package lists, `download` wants those of `update`."""
    tools = tmp_path / "bin"
    tools.mkdir()
    ready = "true" if lists else 'ls "$here"/lists/fetched'
    (tools / "apt-get").write_text(f"""#!/bin/sh
here=$PWD
case "$*" in
*update) touch "$here/lists/fetched" ;;
"download {fashion_mnist.PACKAGE}") {ready} || exit 100; touch a.deb ;;
*"download {fashion_mnist.PACKAGE}") touch a.deb ;;
esac
""")
    unpacked = str(fashion_mnist.INSTALLED).lstrip("/")
    (tools / "dpkg").write_text(f"""#!/bin/sh
[ "$1 $2 $3" = "-x a.deb ." ] && mkdir -p "{unpacked}" && cp "{source}"/* "{unpacked}"
""")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.defpath}")
    assert fashion_mnist.read_source(None) == FILES


def test_the_public_download_comes_last(source, monkeypatch, capfd):
    monkeypatch.setattr(fashion_mnist, "ADDRESS", source.as_uri())
    assert fashion_mnist.read_source(None) == FILES
    assert f"downloading {source.as_uri()}" in capfd.readouterr().out


def test_no_source_at_all(tmp_path, source, main):
    with pytest.raises(InputError, match=r"cannot be downloaded .*no apt-get here; file:.*not there.*--source"):
        main(["fashion-mnist", f"--out={tmp_path / 'out'}"])


def test_the_script_refuses_a_foreign_directory_before_it_downloads(tmp_path):
    """It runs in the repository's root, which is on the path by installation or PYTHONPATH alone."""
    (tmp_path / "foreign").touch()
    result = subprocess.run(
        [sys.executable, "launch/prepare.py", "fashion-mnist", f"--out={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"prepare.py: --out={tmp_path}: holds foreign")
    assert result.stderr.count("\n") == 1
