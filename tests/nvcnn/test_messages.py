"""What a command that cannot work is answered: one line, which says what to do.

The tables of docs/messages.md are what is said here: `NVCNN_WRITE_DOCS=1 pytest tests/nvcnn/test_messages.py` writes
them. A command is started in the directory that `files` makes, by the functions that its program calls.
"""

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nvcnn.evaluate import evaluate
from nvcnn.export import export
from nvcnn.predict import predict
from nvcnn.prepare import flags as preparation
from nvcnn.program import InputError
from nvcnn.settings import Evaluation, Export, Prediction, Settings, parse
from nvcnn.train import train
from tests.nvcnn.checkpoints import state_of, weights_of
from tests.samples import picture, write_folders, write_split

DOCS = Path(__file__).parents[2] / "docs/messages.md"
PROGRAMS: dict[str, Callable[[list[str]], int | None]] = {
    "train.py": lambda arguments: train(parse(Settings, arguments)),
    "eval.py": lambda arguments: evaluate(parse(Evaluation, arguments)),
    "predict.py": lambda arguments: predict(parse(Prediction, arguments)),
    "export.py": lambda arguments: export(parse(Export, arguments)),
    "prepare.py": lambda arguments: preparation.prepare(preparation.parse(arguments)),
}
COMMANDS = {  # by heading
    "Flags by the names of other programs": [
        "train.py --model=resnet50 --lr=0.1",
        "train.py --model=resnet50 --epochs 90",
        "train.py --model=resnet50 --data-dir=photos",
        "train.py --model=resnet50 --batchsize=32",
        "train.py --arch=resnet50",
        "train.py --model=resnet50 --amp",
        "train.py --model=resnet50 --output_dir=runs/a",
        "train.py --model=resnet50 --pretrained=weights.pth",
        "train.py --model=resnet50 --num_gpus=8",
        "train.py --model=resnet50 -j 8",
        "train.py --model=resnet50 --resume",
        "train.py --model=resnet50 --no_fp16",
        "train.py --model=resnet50 --mixup_alpha=0.2",
        "train.py --model=resnet50 --model_ema_decay 0.9999",
        "train.py --model=resnet50 --noema",
        "train.py --model=resnet50 --zero_init_residual",
        "train.py --config=resnet50",
        "train.py --model=resnet50 --norm-weight-decay=0",
        "train.py --model=resnet50 --nesterov",
        "train.py --model=resnet50 --flag=1",
        "predict.py dog.jpg --checkpoint=cats.pt --topk=3",
        "prepare.py folder --data=photos --out=prepared",
    ],
    "Words without a flag": [
        "train.py resnet50",
        "train.py --model=resnet50 photos",
        "train.py --model=resnet50 lr=0.1",
        "train.py --model=resnet50 --batch_size=32 now",
        "eval.py run --data_dir=cats",
        "eval.py cats.pt --data_dir=cats",
    ],
    "Values": [
        "train.py",
        "train.py --model=resnet51",
        "train.py --model=inception_v3",
        "train.py --model=efficientnet_b0",
        "train.py --model=resnet50 --data_dir=",
        "train.py --model=resnet50 --fp16=True",
        "train.py --model=resnet50 --batch_size=many",
        "train.py --model=resnet50 --batch_size=0",
        "train.py --model=resnet50 --learning_rate=0",
        "train.py --model=resnet50 --larc_mode=trust",
        "train.py --model=resnet50 --larc_exclude=1d",
        "train.py --model=resnet50 --loss_scale=auto",
        "train.py --model=resnet50 --crop_area=0.5",
        "train.py --model=resnet50 --crop_aspect=2,1",
        "train.py --model=resnet50 --eval_crop=1.5",
        "train.py --model=resnet50 --label_smoothing=1",
        "train.py --model=resnet50 --image_size=16",
        "train.py --model=lenet --image_size=32",
        "train.py --model=lenet --aux",
        "train.py --model=resnet50 --train_size=160,192",
        "train.py --model=resnet50 --train_size=160:12,192 --num_batches=9",
        "train.py --model=resnet50 --ema=1",
        "train.py --model=resnet50 --clip_norm=0",
        "train.py --model=resnet50 --accumulate=0",
        "train.py --model=resnet50 --mixup=-1",
        "train.py --model=resnet50 --cutmix=1 --batch_size=1",
        "train.py --model=lenet --zero_gamma",
        "train.py --model=resnet50 --no_decay=bias",
        "train.py --model=resnet50 --max_skipped=0",
        "train.py --model=lenet --num_classes=1",
        "train.py --model=resnet18 --image_size=32 --batch_size=1",
        "train.py --model=resnet50 --seed=-1",
        "train.py --model=resnet50 --keep=0",
        "train.py --model=resnet50 --fp16 --bf16",
        "train.py --model=resnet50 --num_epochs=90",
        "train.py --model=resnet50 --freeze=backbone",
        "train.py --model=resnet50 --weights_from=timm",
        "train.py --model=resnet50 --log_tensors",
        "train.py --model=resnet50 --eval",
        "eval.py --data_dir=cats",
        "predict.py --log_dir=run",
        "predict.py dog.jpg",
        "predict.py '' --checkpoint=cats.pt",
        "predict.py dog.jpg --checkpoint=cats.pt --json --csv",
        "export.py --checkpoint=cats.pt --out=dog.jpg",
        "export.py --checkpoint=cats.pt --out=cats.onnx --fold",
        "prepare.py photos",
        "prepare.py folder --train=photos",
        "prepare.py folder --train=photos --out=photos/prepared",
        "prepare.py folder --train=cats --out=prepared",
    ],
    "Recipes": [
        "train.py --recipe=resnet",
        "train.py --recipe=none.yaml",
        "train.py --recipe=dashes.yaml",
        "train.py --recipe=twice.yaml",
        "train.py --recipe=no-value.yaml",
        "train.py --recipe=switch.yaml",
        "train.py --recipe=words.yaml",
        "train.py --recipe=both.yaml",
    ],
    "Data": [
        "train.py --model=lenet --data_dir=~/photos",
        "train.py --model=lenet --data_dir=dog.jpg",
        "train.py --model=lenet --data_dir=photos",
        "train.py --model=lenet --data_dir=cats/train",
        "train.py --model=lenet --data_dir=.",
        "train.py --model=lenet --data_dir=cats",
        "train.py --model=lenet --data_dir=cats --num_classes=5 --batch_size=2",
        "train.py --model=resnet18 --data_dir=cats --batch_size=2 --num_epochs=8 --train_size=160:12,192",
        "eval.py --data_dir=undivided --checkpoint=cats.pt",
        "eval.py --data_dir=birds --checkpoint=cats.pt",
        "eval.py --data_dir=three --checkpoint=cats.pt",
        "eval.py --data_dir=records --checkpoint=cats.pt",
    ],
    "Weights": [
        "eval.py --data_dir=cats --log_dir=runs",
        "eval.py --data_dir=cats --log_dir=empty",
        "eval.py --data_dir=cats --log_dir=cats.pt",
        "eval.py --data_dir=cats --checkpoint=none.pt",
        "eval.py --data_dir=cats --checkpoint=run",
        "eval.py --data_dir=cats --checkpoint=dog.jpg",
        "eval.py --data_dir=cats --checkpoint=page.pth",
        "eval.py --data_dir=cats --checkpoint=pointer.pth",
        "eval.py --data_dir=cats --checkpoint=cats.onnx",
        "eval.py --data_dir=cats --checkpoint=cats.json",
        "eval.py --data_dir=cats --checkpoint=half.pt",
        "eval.py --data_dir=cats --checkpoint=cats.pt --model=resnet50",
        "eval.py --data_dir=cats --checkpoint=weights.safetensors",
        "eval.py --data_dir=cats --checkpoint=weights.safetensors --model=lenet",
        "train.py --model=trivial --init=cats.pt",
        "train.py --model=resnet50 --init=weights.safetensors",
    ],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("messages")
    for name, classes in (("cats", ("cat", "lynx")), ("birds", ("crow", "duck")), ("three", ("ant", "bee", "fly"))):
        for split in ("train", "val"):
            for animal in classes:
                write_folders(directory / name, split, 2, name=f"{animal}/{{0}}", suffix="jpg", label=lambda _: 0)
    write_folders(directory / "undivided", "train", 2, name="cat/{0}")
    write_folders(directory / "undivided", "train", 2, name="lynx/{0}")
    write_folders(directory, "photos", 2, name="cat/{0}")
    write_split(directory / "records", "validation", images=4, shards=1)
    state = state_of(
        "lenet", 2, class_names=["cat", "lynx"], settings={"label_base": None, "fp16": False, "bf16": False}
    )
    for name in ("run", "empty"):
        (directory / name).mkdir()
    torch.save(state, directory / "run/checkpoint-00000009.pt")
    torch.save(state, directory / "cats.pt")
    (directory / "half.pt").write_bytes((directory / "cats.pt").read_bytes()[:5000])
    save_file(weights_of("lenet", 2, 28), directory / "weights.safetensors")
    (directory / "dog.jpg").write_bytes(picture(1, "JPEG", "RGB"))
    (directory / "page.pth").write_text("<!DOCTYPE html><html>404 Not Found</html>")
    (directory / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for name, text in (
        ("dashes", "batch-size: 256"),
        ("twice", "model: vgg16"),
        ("no-value", "data_dir:"),
        ("switch", "fp16: yes"),
        ("words", "batch_size: many"),
        ("both", "fp16: true\nbf16: true"),
    ):
        (directory / f"{name}.yaml").write_text(f"model: resnet50\n{text}\n")
    (directory / "cats.onnx").write_bytes(b"\x08\x08")
    (directory / "cats.json").write_text('{"classes": 2}')
    return directory


def answer(command: str, capsys) -> str:
    """Returns the line that the program ends with, as a cell of a table."""
    program, *arguments = shlex.split(command)
    with pytest.raises(InputError) as raised:
        PROGRAMS[program](arguments)
    capsys.readouterr()
    line = f"{program}: {raised.value}"
    assert "\n" not in line
    return line.replace("|", "\\|")


def page() -> dict[str, str]:
    """Returns the text below each heading."""
    parts = DOCS.read_text().split("\n## ")[1:]
    return {heading: text for heading, _, text in (part.partition("\n\n") for part in parts)}


def normal(text: str) -> str:
    """Returns the text without quotes, which argparse has around choices in some versions of Python."""
    return text.replace("'", "").strip()


@pytest.mark.parametrize("heading", COMMANDS)
def test_what_is_said_is_what_the_page_says(heading, files, monkeypatch, capsys):
    if heading == "Data":
        pytest.importorskip("nvidia.dali")
    monkeypatch.chdir(files)
    monkeypatch.setenv("HOME", "/home/me")
    rows = [f"| `{command}` | {answer(command, capsys)} |" for command in COMMANDS[heading]]
    table = "\n".join(["| command | said |", "|---|---|", *rows])
    if os.environ.get("NVCNN_WRITE_DOCS"):
        text = DOCS.read_text()
        before = text.partition("\n## ")[0] if heading == next(iter(COMMANDS)) else text.rstrip("\n")
        DOCS.write_text(f"{before}\n\n## {heading}\n\n{table}\n".replace("\n\n\n", "\n\n"))
    assert normal(page()[heading]) == normal(table)


def test_the_page_has_nothing_else():
    assert list(page()) == list(COMMANDS)
