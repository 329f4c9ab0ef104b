"""Users go from raw archives to an accuracy: prepare, stop, go on, train and evaluate on two ranks."""

import json
import re
import signal

import numpy as np
import pytest
from PIL import Image

from nvcnn.prepare import imagenet
from nvcnn.prepare.encode import Encoding
from nvcnn.prepare.write import write_dataset
from tests.raw_imagenet import Raw, make, photograph

PREPARE = "launch/prepare.py"


def bar(seed: int, label: int) -> Image.Image:
    """Returns 28 x 28 pixels of noise with a bright bar at the label's place: LeNet learns it in a few steps."""
    pixels = np.random.default_rng(seed).integers(0, 100, (28, 28, 3), dtype=np.uint8)
    pixels[4 * label + 4 : 4 * label + 8] = 250
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Raw:
    return make(tmp_path_factory.mktemp("raw"), per_class=40, val=50, picture=bar)


def arguments(raw: Raw, out, *more) -> list:
    return ["imagenet", f"--train={raw.train}", f"--val={raw.val}", f"--devkit={raw.devkit}", f"--out={out}", *more]


@pytest.mark.parametrize("transport", ["auto", pytest.param("torch", marks=pytest.mark.full)])
def test_from_the_archives_to_an_accuracy(launch, raw, tmp_path, transport):
    out = tmp_path / "imagenet"
    text = launch.run(PREPARE, *arguments(raw, out, "--shards=8,2", "--workers=2"))
    assert f"ImageNet in {out}: 200 train images, 50 validation images, 2 encoded anew" in text
    assert re.search(r"^train-00005-of-00008: 25 images$", text, re.MULTILINE)
    launch.train(
        *("--model=lenet", "--crop_area=0.9,1", "--eval_crop=1", "--learning_rate=0.05", "--batch_size=8"),
        *(f"--data_dir={out}", f"--log_dir={tmp_path}/run", "--num_epochs=3", f"--transport={transport}"),
        ranks=2,
    )
    text = launch.run(
        "launch/eval.py",
        f"--data_dir={out}",
        f"--log_dir={tmp_path}/run",
        f"--transport={transport}",
        "--json",
        ranks=2,
    )
    result = json.loads(next(line for line in text.splitlines()[::-1] if line.startswith("{")))
    assert result["images"] == 50
    assert result["top1"] > 90, text


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_stopped_and_again(launch, tmp_path, how):
    """The exit code is 3, and the same command goes on to the bytes of a run that was left alone."""
    raw = make(tmp_path / "raw", per_class=60, picture=lambda seed, label: photograph(seed, label).resize((700, 500)))
    options = ("--shards=60,2", "--workers=1", "--max_side=64")  # a worker that is not far ahead of what is counted
    out = tmp_path / "out"
    text = launch.run("tests/end_to_end/stopped.py", int(how), *arguments(raw, out, *options), code=3)
    assert "prepare.py: stopped; the same command goes on from here" in text
    assert "Traceback" not in text
    written = {path.name: path.stat().st_ino for path in out.glob("*-of-?????")}
    assert 3 <= len(written) < 62
    text = launch.run(PREPARE, *arguments(raw, out, *options))
    assert not any(f"{name}: " in text for name in written)
    assert written.items() <= {path.name: path.stat().st_ino for path in out.glob("*-of-?????")}.items()
    straight = tmp_path / "straight"
    encoding = Encoding(("JPEG",), max_side=64)
    blueprint = imagenet.blueprint(raw.train, raw.val, devkit=raw.devkit, encoding=encoding, shards=(60, 2))
    write_dataset(blueprint, straight, workers=2)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in straight.iterdir()}
