"""Flags have the original's names and defaults, and every bad value has its own line."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from nvcnn.models import ALGORITHMS
from nvcnn.program import InputError
from nvcnn.settings import Evaluation, Export, Prediction, Settings, as_json, differences, parse

ROOT = Path(__file__).parents[2]
ORIGINAL = {
    "data_dir": None,
    "batch_size": 64,
    "num_batches": 50,
    "num_epochs": None,
    "log_dir": "",
    "display_every": 1,
    "save_interval": 43200,
    "summary_interval": 3600,
    "loss_scale": 1.0,
    "larc_eta": None,
    "larc_mode": "clip",
    "learning_rate": None,
    "eval": False,
    "fp16": False,
}
NEWER = {
    "schedule": "poly",
    "warmup_epochs": None,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "no_decay": "none",
    "clip_norm": None,
    "ema": None,
    "label_smoothing": 0.0,
    "accumulate": 1,
    "mixup": 0.0,
    "cutmix": 0.0,
    "larc_exclude": "none",
    "bf16": False,
    "conv": "auto",
    "momentum_dtype": "fp32",
    "crop_area": (0.1, 1.0),
    "crop_aspect": (0.8, 1.25),
    "image_size": None,
    "eval_size": None,
    "train_size": None,
    "eval_crop": None,
    "eval_aspect": None,
    "eval_interpolation": None,
    "normalize": None,
    "aux": False,
    "zero_gamma": False,
    "init": None,
    "weights_from": None,
    "freeze": "none",
    "num_classes": None,
    "num_images": None,
    "label_base": None,
    "data_backend": None,
    "check_data": "none",
    "skip_bad_images": False,
    "recipe": None,
    "resnet_v1": False,
    "eval_every": None,
    "save_every": 1,
    "max_skipped": 50,
    "seed": 1,
    "keep": 3,
    "cuda_graph": "auto",
    "transport": "auto",
    "rank_timeout": 600,
    "log_tensors": False,
    "dry_run": False,
}


def test_names_and_defaults_are_frozen():
    settings = parse(Settings, ["--model=lenet"])
    assert {f.name: getattr(settings, f.name) for f in fields(Settings)} == {"model": "lenet"} | ORIGINAL | NEWER


def test_names_and_defaults_of_an_evaluation_are_frozen():
    asked = parse(Evaluation, ["--data_dir=d", "--log_dir=l"])
    assert asdict(asked) == {
        "data_dir": "d",
        "log_dir": "l",
        "checkpoint": None,
        "ema": True,
        "model": None,
        "weights_from": None,
        "image_size": None,
        "eval_size": None,
        "normalize": None,
        "eval_crop": None,
        "eval_aspect": None,
        "eval_interpolation": None,
        "batch_size": 64,
        "conv": "auto",
        "json": False,
        "per_class": False,
        "report": None,
        "transport": "auto",
        "rank_timeout": 600,
        "data_backend": None,
        "skip_bad_images": False,
    }


def test_names_and_defaults_of_an_export_are_frozen():
    evaluation = asdict(parse(Evaluation, ["--data_dir=d", "--log_dir=l"]))
    export = asdict(parse(Export, ["--out=o", "--log_dir=l"]))
    own = {"out": "o", "format": "safetensors", "fold": False}
    assert {name: value for name, value in export.items() if name not in evaluation} == own
    assert own | {name: evaluation[name] for name in export if name in evaluation} == export


def test_names_and_defaults_of_a_prediction_are_frozen():
    evaluation = asdict(parse(Evaluation, ["--data_dir=d", "--log_dir=l"]))
    prediction = asdict(parse(Prediction, ["a.jpg", "--log_dir=l", "b"]))
    own = {"images": ("a.jpg", "b"), "top": 5, "json": False, "csv": False}
    assert own | {name: evaluation[name] for name in prediction if name not in own} == prediction


def test_eval_is_the_evaluation_of_the_same_flags():
    flags = "--data_dir=d --log_dir=l -m lenet -b 3 --conv=torch --transport=torch --data_backend=torch"
    flags = [*flags.split(), "--skip_bad_images"]
    training = [*flags, "--seed=7", "--init=w.pth", "--weights_from=timm", "--ema=0.9", "--freeze=backbone"]
    assert parse(Settings, [*training, "--eval"]).evaluation() == parse(Evaluation, flags)


@pytest.mark.parametrize("program", [Settings, Evaluation])
def test_the_algorithms_of_convolutions_have_a_flag(program):
    (conv,) = (f.metadata["choices"] for f in fields(program) if f.name == "conv")
    assert set(conv) == {"auto", *ALGORITHMS}


def test_the_originals_command():
    command = (
        "--model=resnet50 --data_dir=/data/imagenet_tfrecord --batch_size=256 --fp16 --larc_mode=clip --larc_eta=0.003 "
        "--loss_scale=128 --log_dir=./checkpoint-dir --save_interval=3600 --num_epochs=90 --display_every=100 "
        "--learning_rate=2.0"
    )
    s = parse(Settings, command.split())
    assert (s.model, s.batch_size, s.fp16, s.larc_eta, s.loss_scale) == ("resnet50", 256, True, 0.003, 128.0)
    assert (s.save_interval, s.num_epochs, s.display_every, s.learning_rate) == (3600, 90, 100, 2.0)


def test_short_and_negative_forms():
    s = parse(Settings, ["-m", "lenet", "-b", "7", "--fp16", "--nofp16", "--noeval"])
    assert (s.model, s.batch_size, s.fp16, s.eval) == ("lenet", 7, False, False)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--model=resnet51", "--model=resnet51"),
        ("--resnet_v1", "--resnet_v1"),
        ("--zero_gamma", "--zero_gamma is for resnet18, resnet34, resnet50"),
        ("--model=resnet18 --zero_gamma --init=w.pth", "--zero_gamma is for random weights: --init"),
        ("--num_epoch=3", "--num_epoch"),  # unknown, not an abbreviation
        ("--batch_size=0", "--batch_size=0"),
        ("--batch_size=x", "--batch_size"),
        ("--num_batches=-1", "--num_batches"),
        ("--learning_rate=nan", "--learning_rate=nan"),
        ("--learning_rate=inf", "--learning_rate"),
        ("--learning_rate=0", "--learning_rate"),
        ("--larc_eta=-1", "--larc_eta"),
        ("--larc_mode=trust", "--larc_mode"),
        ("--loss_scale=0", "--loss_scale"),
        ("--loss_scale=sometimes", "--loss_scale"),
        ("--loss_scale=nan", "--loss_scale"),
        ("--loss_scale=1e39", "--loss_scale=1e+39: must be a number from 1e-30 to 1e+30, or 'dynamic'"),
        ("--loss_scale=1e-46", "--loss_scale=1e-46"),  # 0 in fp32
        ("--learning_rate=1e-46", "--learning_rate=1e-46: must be a number from 1e-30 to 1e+30"),
        ("--larc_eta=1e39", "--larc_eta=1e+39"),
        ("--image_size=32769", "--image_size=32769"),
        ("--eval_size=66", "--eval_size=66: --model=alexnet takes 67 and more"),
        ("--train_size=66:2,224", "--train_size=66: --model=alexnet takes 67 and more"),
        ("--train_size=128:2", "--train_size=128:2: must be SIZE, or SIZE:EPOCHS,...,SIZE"),
        ("--train_size=", "--train_size=: is empty"),
        ("--train_size=128,224", "--train_size=128,224: must be"),
        ("--train_size=128:0,224", "--train_size=128:0,224: must be"),
        ("--train_size=128:2,224", "--train_size=128:2,224 needs --data_dir"),
        ("--crop_area=1e-46,1", "--crop_area"),
        ("--crop_aspect=1,1e39", "--crop_aspect"),
        ("--crop_area=0,1", "--crop_area"),
        ("--crop_area=0.5", "--crop_area"),
        ("--crop_area=0.5,2", "--crop_area"),
        ("--crop_aspect=2,1", "--crop_aspect"),
        ("--eval_crop=1.5", "--eval_crop"),
        ("--label_smoothing=1", "--label_smoothing"),
        ("--momentum=1", "--momentum=1.0: must be at least 0 and below 1"),
        ("--weight_decay=-1e-4", "--weight_decay=-0.0001: must be 0, or a number"),
        ("--weight_decay=1e-46", "--weight_decay"),
        ("--no_decay=bias", "--no_decay"),
        ("--clip_norm=0", "--clip_norm=0.0: must be a number from 1e-30 to 1e+30"),
        ("--ema=1", "--ema=1.0: must be above 0 and below 1"),
        ("--schedule=linear", "--schedule"),
        ("--warmup_epochs=-1", "--warmup_epochs=-1.0: must be a number of epochs, 0 or more"),
        ("--warmup_epochs=nan", "--warmup_epochs=nan"),
        ("--accumulate=0", "--accumulate=0"),
        ("--mixup=-1", "--mixup=-1.0: must be 0, or from"),
        ("--cutmix=nan", "--cutmix=nan"),
        ("--cutmix=1 --batch_size=1", "--cutmix=1.0: mixes images of a batch"),
        ("--seed=-1", "--seed"),
        ("--keep=0", "--keep"),
        ("--eval_every=-1", "--eval_every=-1"),
        ("--save_every=-1", "--save_every=-1"),
        ("--max_skipped=0", "--max_skipped=0"),
        ("--rank_timeout=-1", "--rank_timeout=-1: must be 0 or more"),
        ("--eval_every=2", "--eval_every=2 needs --data_dir"),
        ("--fp16 --bf16", "--fp16 and --bf16"),
        ("--momentum_dtype=fp16", "--momentum_dtype"),
        ("--larc_exclude=1d", "--larc_exclude=1d needs --larc_eta"),
        ("--larc_exclude=bias --larc_eta=1", "--larc_exclude"),
        ("--log_tensors", "--log_tensors needs --log_dir"),
        ("--freeze=backbone", "--freeze=backbone needs --init"),
        ("--freeze=head --init=w.pth", "--freeze"),
        ("--weights_from=timm", "--weights_from=timm needs --init"),
        ("--weights_from=me --init=w.pth", "--weights_from"),
        ("--num_epochs=2", "--data_dir"),
        ("--eval", "--data_dir"),
        ("--eval --data_dir=x", "--log_dir"),
        ("--transport=pigeon", "--transport"),
        ("--cuda_graph=maybe", "--cuda_graph"),
        ("--data_backend=tf", "--data_backend"),
        ("--check_data=all", "--check_data"),
    ],
)
def test_bad_flags_are_named_in_one_line(arguments, names):
    with pytest.raises(InputError) as error:
        parse(Settings, ["--model=alexnet", *arguments.split()])
    assert names in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_meant_is_taken_for_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    settings = parse(Settings, ["--model=ResNet50", "--data_dir=~/data", "--init", "~/w.pth", "-b7", "--log_dir=a/~"])
    assert (settings.model, settings.data_dir, settings.init) == ("resnet50", "/home/me/data", "/home/me/w.pth")
    assert (settings.batch_size, settings.log_dir) == (7, "a/~")
    asked = parse(Prediction, ["~/a.jpg", "--log_dir", "~/run", "-m", "VGG16"])
    assert (asked.images, asked.log_dir, asked.model) == (("/home/me/a.jpg",), "/home/me/run", "vgg16")


@pytest.mark.parametrize("program", [Settings, Evaluation, Prediction, Export])
def test_help_has_the_default_of_each_flag(program, capsys):
    with pytest.raises(SystemExit):
        parse(program, ["--help"])
    entries = re.split(r"\n\s*\n|\n  (?=-)", capsys.readouterr().out)
    said = {found[1]: entry for entry in entries if (found := re.match(r"(?:-\w.*, )?--(\w+)", entry))}
    for name in {f.name for f in fields(program)} - {"images"}:
        assert re.search(r"\(default\s.+\)|\(required\)|none:", said[name], re.DOTALL), said[name]


def test_help_says_what_is_on(capsys):
    with pytest.raises(SystemExit):
        parse(Evaluation, ["--help"])
    said = capsys.readouterr().out
    assert re.search(r"--noema: those\s+that are trained \(default on\)", said)
    assert "training and evaluation" not in said


def test_model_is_required():
    with pytest.raises(InputError, match="--model"):
        parse(Settings, [])


def test_readme_has_what_a_resumed_run_may_change():
    (flags,) = re.findall(r"these alone may\s+differ: `([^`]+)`", (ROOT / "README.md").read_text())
    assert flags.split() == [f"--{f.name}" for f in fields(Settings) if f.metadata["may_differ"]]


def test_what_a_resumed_run_may_change():
    one = parse(Settings, ["--model=lenet", "--crop_area=0.5,1"])
    stored = json.loads(json.dumps(as_json(one)))
    free = ["--display_every=7", "--save_interval=1", "--summary_interval=1", "--keep=9", "--data_dir=d", "--log_dir=e"]
    free += ["--log_tensors", "--transport=torch", "--eval_every=0", "--save_every=0", "--max_skipped=9"]
    free += ["--rank_timeout=9"]
    assert differences(one, stored) == []
    assert differences(parse(Settings, ["--model=lenet", "--crop_area=0.5,1", *free]), stored) == []
    other = parse(Settings, ["--model=trivial", "--crop_area=0.6,1", "--momentum_dtype=bf16"])
    assert differences(other, stored) == [
        "--model: there lenet, here trivial",
        "--momentum_dtype: there fp32, here bf16",
        "--crop_area: there [0.5, 1.0], here [0.6, 1.0]",
    ]
