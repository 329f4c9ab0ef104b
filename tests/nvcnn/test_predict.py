"""A picture's classes are those that evaluation finds; one that cannot be used is a line, and not the end."""

import csv
import io
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from nvcnn.evaluate import evaluate
from nvcnn.models import ORIGINS
from nvcnn.predict import class_names, likeliest, predict
from nvcnn.program import InputError
from nvcnn.settings import Evaluation, Prediction, parse
from nvcnn.weights import Weights
from tests.nvcnn.checkpoints import state_of
from tests.nvcnn.data.reading import BACKENDS
from tests.nvcnn.test_evaluate import Fixed
from tests.samples import file_of, picture, write_split

NAMES = [f"class {n}, or so" for n in range(10)]


def checkpoint(path: Path) -> Path:
    """Writes one whose answers differ from picture to picture."""
    settings = {"label_base": 3, "fp16": False, "bf16": False}
    preprocessing = {"image_size": 28, "normalize": "imagenet", "eval_crop": 0.8, "eval_aspect": "keep"}
    state = state_of("lenet", class_names=NAMES, settings=settings, preprocessing=preprocessing)
    torch.save(state, path)
    return path


def said(capsys, *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    assert predict(parse(Prediction, list(map(str, arguments)))) == code
    return capsys.readouterr().out


def pictures() -> list[bytes]:
    """Returns pictures of each kind that training reads, some of which viewers turn."""
    kinds = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
    found = [picture(i, kind, "RGB", (60, 44)) for i, kind in enumerate(kinds * 2)]
    upright = Image.open(io.BytesIO(picture(50, "PNG", "RGB", (60, 44))))
    return found + [file_of(upright, "JPEG", orientation) for orientation in (1, 3, 6)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_eval_counts_what_is_predicted(tmp_path, capsys, backend):
    if backend == "dali_cpu":
        pytest.importorskip("nvidia.dali")
    of, found = checkpoint(tmp_path / "c.pt"), pictures()
    (tmp_path / "folder").mkdir()
    for i, data in enumerate(found):  # a name tells nothing of what a file holds
        (tmp_path / f"folder/{i:02d}.jpg").write_bytes(data)
    lines = said(capsys, tmp_path / "folder", f"--checkpoint={of}", "--json", "--top=1").splitlines()
    best = [json.loads(line)["classes"][0]["class"] for line in lines]
    assert len(set(best[:-3])) > 2  # else equality says little
    assert len(set(best[-3:])) > 1
    write_split(tmp_path / "data", "validation", len(found), 1, lambda i: found[i], lambda i: best[i] + 3)
    flags = [f"--data_dir={tmp_path}/data", f"--checkpoint={of}", f"--data_backend={backend}"]
    assert evaluate(parse(Evaluation, [*flags, "--json"])) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == 100


def test_a_bad_picture_is_a_line_and_not_the_end(tmp_path, capsys):
    checkpoint(tmp_path / "checkpoint-00000001.pt")
    (tmp_path / "checkpoint-00000002.pt").write_bytes(b"damaged")
    for name in ("b.png", "deep/c.jpg", "deep/a.PNG", "notes.txt", "z.bmp"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"" if name == "z.bmp" else picture(random.Random(name).randrange(100), mode="RGB"))
    (tmp_path / "empty").mkdir()
    given = [tmp_path / "folder/z.bmp", tmp_path / "none.jpg", tmp_path / "folder", tmp_path / "empty", __file__]
    given = [*given, f"--log_dir={tmp_path}", "--top=99", tmp_path / "folder/b.png"]
    used = [str(tmp_path / "folder" / name) for name in ("b.png", "deep/a.PNG", "deep/c.jpg", "b.png")]

    capsys.readouterr()
    assert predict(parse(Prediction, [*map(str, given), "--json"])) == 1
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [one["image"] for one in found] == used
    assert found[0] == found[-1]
    for one in found:
        shares = [c["probability"] for c in one["classes"]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1)
        assert sorted(c["class"] for c in one["classes"]) == list(range(10))
        assert all(c["name"] == NAMES[c["class"]] for c in one["classes"])
    assert [line.replace(str(tmp_path), "") for line in err.splitlines() if "checkpoint" not in line] == [
        "/folder: 1 files are left out, whose names are not those of images",
        "/folder/z.bmp: the image cannot be decoded (it has no bytes)",
        "/none.jpg: cannot be read (No such file or directory)",
        "/folder/z.bmp: the image cannot be decoded (it has no bytes)",
        "/empty: holds no images (*.jpg, *.jpeg, *.png, *.bmp, *.webp, *.tif, *.tiff, *.ppm, *.pgm, *.jp2)",
        f"{__file__}: the image cannot be decoded (it is not a JPEG, PNG, BMP, WebP, TIFF, PPM or JPEG 2000 file)",
    ]

    rows = list(csv.DictReader(io.StringIO(said(capsys, *given, "--csv", "--batch_size=2", code=1))))
    assert [(row["image"], row["rank"]) for row in rows] == [
        (path, str(rank)) for path in used for rank in range(1, 11)
    ]
    expected = [(c["class"], c["name"], c["probability"]) for one in found for c in one["classes"]]
    for row, (number, name, probability) in zip(rows, expected, strict=True):
        assert (row["class"], row["name"]) == (str(number), name)
        assert float(row["probability"]) == pytest.approx(probability, rel=1e-4)

    best = found[0]["classes"][0]
    text = said(capsys, used[0], f"--log_dir={tmp_path}", "--top=1").splitlines()
    assert text[0].startswith("Weights:     ")
    assert text[-2:] == [used[0], f"  {100 * best['probability']:6.2f} %  {best['name']}"]


def test_logits_that_are_not_finite_are_no_answer():
    logits = torch.eye(3)
    logits[1, 2] = float("nan")
    images = torch.zeros(3, 4, 4, 3, dtype=torch.uint8)
    found = likeliest(Fixed(logits), images, torch.float32, "signed", 2)
    assert [[n for n, _ in classes][:1] for classes in found] == [[0], [], [2]]


def test_classes_of_published_weights_have_imagenets_names(monkeypatch, capsys):
    def weights(num_classes: int) -> Weights:
        return Weights(Path("w.pth"), "timm", "vgg11", ORIGINS["timm"]["vgg11"], {}, num_classes)

    names = class_names(weights(1000))
    assert (len(names), names[0], names[207]) == (1000, "tench", "golden retriever")
    assert class_names(weights(10)) == ()
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    assert class_names(weights(1000)) == ()
    assert "pip install torchvision" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--log_dir=l", "the following arguments are required: IMAGES"),
        ("a.jpg", "give one of --log_dir"),
        ("a.jpg --log_dir=l --top=0", "--top=0: must be at least 1"),
        ("a.jpg --log_dir=l --batch_size=0", "--batch_size=0: must be at least 1"),
        ("a.jpg --log_dir=l --json --csv", "--json and --csv: choose one"),
    ],
)
def test_bad_flags(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(Prediction, arguments.split())
