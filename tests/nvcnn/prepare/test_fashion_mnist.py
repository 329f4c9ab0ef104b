"""prepare.py on small files of the same format: what it writes, restarting, where the files come from, exit codes."""

import gzip
import hashlib
import importlib.util
import io
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvcnn.data.backend import open_evaluation
from nvcnn.data.dataset import find_dataset
from nvcnn.data.tfrecord import decode_example, read_records
from nvcnn.prepare import fashion_mnist, formats, shards
from nvcnn.program import InputError

ROOT = Path(__file__).parents[3]
IMAGES = {"train": 203, "t10k": 41}


def pixels(prefix: str) -> np.ndarray:
    return np.random.default_rng(len(prefix)).integers(0, 256, (IMAGES[prefix], 28, 28), dtype=np.uint8)


def labels(prefix: str) -> np.ndarray:
    return np.random.default_rng(len(prefix) + 9).integers(0, 10, IMAGES[prefix], dtype=np.uint8)


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A directory of four small IDX files, taken for the real ones; no other source is there."""
    directory = tmp_path / "source"
    directory.mkdir()
    for prefix, n in IMAGES.items():
        files = {
            f"{prefix}-images-idx3-ubyte": struct.pack(">4I", 2051, n, 28, 28) + pixels(prefix).tobytes(),
            f"{prefix}-labels-idx1-ubyte": struct.pack(">2I", 2049, n) + labels(prefix).tobytes(),
        }
        for name, data in files.items():
            (directory / f"{name}.gz").write_bytes(gzip.compress(data))
            monkeypatch.setitem(fashion_mnist.SHA256, name, hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(fashion_mnist, "INSTALLED", tmp_path / "not installed")
    monkeypatch.setattr(fashion_mnist, "ADDRESS", (tmp_path / "not there").as_uri())
    monkeypatch.setenv("PATH", "")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_writes_every_image_once_with_its_features(tmp_path, source, device):
    out = tmp_path / "deep" / "out"
    fashion_mnist.fetch_and_write(out, source, workers=2)
    assert len(list(out.iterdir())) == 2 * (8 + 2) + 2
    assert json.loads((out / "dataset.json").read_text()) == {
        "num_classes": 10,
        "label_base": 1,
        "class_names": list(fashion_mnist.CLASS_NAMES),
        "images": {"train": 203, "validation": 41},
    }
    for split, prefix in (("train", "train"), ("validation", "t10k")):
        found = find_dataset(out, num_classes=None, label_base=None, split=split)
        seen = []
        for shard in found.source(split).shards:
            for record in read_records(shard):
                example = decode_example(record)
                (encoded,), (label,) = example.pop("image/encoded"), example.pop("image/class/label")
                assert example == {
                    "image/class/text": [fashion_mnist.CLASS_NAMES[label - 1].encode()],
                    **{f"image/object/bbox/{side}": [] for side in ("xmin", "ymin", "xmax", "ymax")},
                }
                image = Image.open(io.BytesIO(encoded))
                assert (image.format, image.mode) == ("PNG", "L")
                seen.append((np.asarray(image).tobytes(), label - 1))
        expected = [(image.tobytes(), label) for image, label in zip(pixels(prefix), labels(prefix), strict=True)]
        assert sorted(seen) == sorted(expected)
        assert seen != expected  # shuffled
    data = open_evaluation(
        found,
        "dali_cpu",
        batch_size=50,
        image_size=28,
        crop=1.0,
        rank=0,
        ranks=1,
        device=device,
        threads=1,
    )
    (batch,) = data
    assert sorted(image[..., c].tobytes() for image in batch.images.cpu().numpy() for c in (2,)) == sorted(
        image.tobytes() for image in pixels("t10k")
    )


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, source, monkeypatch, capfd):
    fashion_mnist.fetch_and_write(tmp_path / "straight", source)
    out = tmp_path / "out"

    class KilledInTheMiddle(shards.Summed):
        def write(self, data):
            if ".train-00005-of-00008." in self.file.name and self.size > 1000:
                os._exit(9)
            return super().write(data)

    with monkeypatch.context() as patched:
        patched.setattr(shards, "Summed", KilledInTheMiddle)
        with pytest.raises(InputError, match="a worker process was killed, perhaps for lack of memory: give"):
            fashion_mnist.fetch_and_write(out, source, workers=1)
    names = {path.name for path in out.iterdir()}
    assert "train-00004-of-00008" in names
    assert not {"train-00005-of-00008", "train-00005-of-00008.idx", "dataset.json"} & names
    assert any(name.endswith(".tmp") for name in names)
    for split in ("train", "validation"):
        with pytest.raises(InputError, match=r"--data_dir=.*: prepare\.py has not finished there"):
            find_dataset(out, num_classes=None, label_base=None, split=split)
    kept = (out / "train-00004-of-00008").stat().st_ino

    capfd.readouterr()
    fashion_mnist.fetch_and_write(out, source, workers=2)
    printed = capfd.readouterr().out
    assert "train-00004" not in printed
    assert "train-00005-of-00008: 26 images" in printed
    assert (out / "train-00004-of-00008").stat().st_ino == kept
    assert contents(out) == contents(tmp_path / "straight")


def test_up_to_date_costs_nothing(tmp_path, source, capfd):
    fashion_mnist.fetch_and_write(tmp_path / "out", source)
    before = contents(tmp_path / "out")
    capfd.readouterr()
    fashion_mnist.fetch_and_write(tmp_path / "out", tmp_path / "no source is needed")
    assert capfd.readouterr().out == f"Fashion-MNIST in {tmp_path / 'out'} is complete\n"
    (tmp_path / "out" / "train-00003-of-00008.idx").unlink()
    fashion_mnist.fetch_and_write(tmp_path / "out", source)
    assert contents(tmp_path / "out") == before


def test_a_terminal_gets_a_bar(tmp_path, source, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fashion_mnist.fetch_and_write(tmp_path / "out", source)
    out, err = capsys.readouterr()
    assert "244/244" in err
    assert "train-00000" not in out


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


def test_the_installed_package_is_used(tmp_path, source, monkeypatch, capfd):
    monkeypatch.setattr(fashion_mnist, "INSTALLED", source)
    fashion_mnist.fetch_and_write(tmp_path / "out")
    assert f"from {source}" in capfd.readouterr().out


def fake_debian(tmp_path, monkeypatch, source, lists: bool) -> None:
    """apt-get and dpkg that behave as Debian's; without package lists, `download` wants those that `update` fetched."""
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


@pytest.mark.parametrize("lists", [True, False])
def test_debians_package_is_downloaded(tmp_path, source, monkeypatch, lists):
    fake_debian(tmp_path, monkeypatch, source, lists)
    fashion_mnist.fetch_and_write(tmp_path / "out")
    assert (tmp_path / "out" / "dataset.json").exists()


def test_the_public_download_comes_last(tmp_path, source, monkeypatch, capfd):
    monkeypatch.setattr(fashion_mnist, "ADDRESS", source.as_uri())
    fashion_mnist.fetch_and_write(tmp_path / "out")
    assert (tmp_path / "out" / "dataset.json").exists()
    assert f"downloading {source.as_uri()}" in capfd.readouterr().out


def test_no_source_at_all(tmp_path, source):
    with pytest.raises(InputError, match=r"no apt-get here; file:.*not there.*--source"):
        fashion_mnist.fetch_and_write(tmp_path / "out")


def test_an_out_with_other_files(tmp_path, source):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"--out=.*holds thesis\.tex"):
        fashion_mnist.fetch_and_write(tmp_path / "out", source)
    assert list(contents(tmp_path / "out")) == ["thesis.tex"]


def test_an_out_that_cannot_be_written(tmp_path, source, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--out=.*file: cannot be made \(File exists\)"):
        fashion_mnist.fetch_and_write(tmp_path / "file", source)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(InputError, match=r"--out=.*out: is not readable and writable"):
        fashion_mnist.fetch_and_write(tmp_path / "out", source)


def test_a_full_disk(tmp_path, source, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "write_record", full)
    with pytest.raises(InputError, match=r"--out=.*No space left on device.*run again"):
        fashion_mnist.fetch_and_write(tmp_path / "out", source)


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location("launch_prepare", ROOT / "launch" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_exit_codes(tmp_path, source, main, monkeypatch, capsys):
    arguments = ["fashion-mnist", f"--out={tmp_path / 'out'}"]
    assert main([*arguments, f"--source={source}", "--workers=2"]) == 0
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    with pytest.raises(InputError, match="Fashion-MNIST cannot be downloaded"):
        main(arguments)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fashion_mnist, "fetch_and_write", interrupted)
    assert main(arguments) == 3


@pytest.mark.parametrize(
    "arguments", [[], ["imagenet21k"], ["fashion-mnist"], ["fashion-mnist", "--out=x", "--workers=0"]]
)
def test_bad_usage(main, arguments):
    with pytest.raises(InputError) as error:
        main(arguments)
    assert "\n" not in str(error.value)


def test_the_script_runs(tmp_path):
    """From the repository's root, where nothing of its own is on the path but by installation or PYTHONPATH."""
    (tmp_path / "foreign").touch()
    result = subprocess.run(
        [sys.executable, "launch/prepare.py", "fashion-mnist", f"--out={tmp_path}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"prepare.py: --out={tmp_path}: holds foreign")
    assert result.stderr.count("\n") == 1
