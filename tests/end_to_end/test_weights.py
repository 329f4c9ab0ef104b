"""Runs that begin with the weights of a file: what is kept, what is made anew, what is written."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from nvcnn.data.records import Records
from tests.samples import record, write_shard

from .conftest import ROOT, last_checkpoint

FASHION = ROOT / "data" / "fashion-mnist"
RESNET = ("--model=resnet18", "--image_size=32", "--num_classes=10", "--batch_size=2")


def published(path: Path, num_classes: int) -> dict[str, Tensor]:
    """Writes weights as torchvision does, and returns them."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=num_classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    torch.save(model.state_dict(), path)
    return model.state_dict()


@pytest.mark.parametrize(
    ("ranks", "precision"),
    [(1, ()), *(pytest.param(2, how, marks=pytest.mark.full) for how in ((), ("--fp16", "--loss_scale=128")))],
)
def test_a_frozen_backbone_keeps_the_bits_of_the_file(launch, records, tmp_path, ranks, precision):
    """Stopped, and resumed when the file is gone."""
    path, log_dir = tmp_path / "resnet18.pth", tmp_path / "run"
    theirs = published(path, num_classes=20)
    arguments = (*RESNET, *precision, f"--init={path}", "--weights_from=torchvision", "--freeze=backbone")
    arguments += (f"--data_dir={records}", f"--log_dir={log_dir}", "--num_batches=8", "--learning_rate=0.1")
    text = launch.train(*arguments, "--dry_run")
    for line in (f"Weights:     {path}, torchvision's resnet18", f"  fc: 20 classes in {path}, 10 here: made anew"):
        assert text.splitlines().count(line) == 1
    assert "of which 5,130 are trained" in text
    assert not log_dir.exists()

    first = launch.start("tests/end_to_end/disturbed.py", "SIGTERM", 2, *arguments, ranks=ranks)
    assert first.wait() == 3, first.text()
    assert f"Weights:     {path}, torchvision's resnet18" in first.text()
    assert "Images:      32 x 32, pixels imagenet; in evaluation crop 0.875, keep, bilinear" in first.text()
    assert "Built with:  epsilon=1e-05" in first.text()
    path.unlink()
    assert "Restored checkpoint" in launch.train(*arguments, ranks=ranks)

    state = last_checkpoint(log_dir)
    assert state["options"] == {"epsilon": 1e-5}
    for name, tensor in state["weights"].items():
        if not name.startswith("fc."):
            assert torch.equal(tensor, theirs[name]), name
    assert state["optimizer"]["momentum"].keys() == {"fc.weight", "fc.bias"}
    assert all(momentum.any() for momentum in state["optimizer"]["momentum"].values())
    text = launch.run("launch/eval.py", f"--data_dir={records}", f"--log_dir={log_dir}", "--json")
    assert "Built with:  epsilon=1e-05" in text
    assert json.loads(text.splitlines()[-1])["step"] == 8


def test_published_weights_are_evaluated_and_exported(launch, records, tmp_path):
    published(tmp_path / "ten.pth", num_classes=10)
    published(tmp_path / "nine.pth", num_classes=9)
    evaluate = ("launch/eval.py", f"--data_dir={records}", "--model=resnet18", "--weights_from=torchvision")
    text = launch.run(*evaluate, f"--checkpoint={tmp_path}/ten.pth", "--image_size=32", "--json")
    assert "pixels imagenet" in text
    result = json.loads(text.splitlines()[-1])
    assert (result["images"], result["step"], result["checkpoint"]) == (101, None, f"{tmp_path}/ten.pth")
    published_as = ("--model=resnet18", "--weights_from=torchvision", "--image_size=32")
    export = ("launch/export.py", f"--checkpoint={tmp_path}/ten.pth", f"--out={tmp_path}/ten.safetensors")
    assert f"Written to {tmp_path}/ten.safetensors" in launch.run(*export, *published_as)
    assert "is there already" in launch.run(*export, *published_as, code=2)
    text = launch.run(*evaluate[:2], f"--checkpoint={tmp_path}/ten.safetensors", "--json")
    again = json.loads(text.splitlines()[-1])
    assert again | {"checkpoint": ""} == result | {"checkpoint": ""}

    text = launch.run(*evaluate, f"--checkpoint={tmp_path}/nine.pth", "--image_size=32", code=2)
    assert f"label 10 is outside 1 .. 9: those are the classes of {tmp_path}/nine.pth, give the data of" in text
    (tmp_path / "data").mkdir()
    for shard in records.iterdir():
        (tmp_path / "data" / shard.name).symlink_to(shard)
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"num_classes": 10, "label_base": 1}))
    evaluate = ("launch/eval.py", f"--data_dir={tmp_path}/data", *evaluate[2:])
    text = launch.run(*evaluate, f"--checkpoint={tmp_path}/nine.pth", "--image_size=32", code=2)
    assert f"--data_dir={tmp_path}/data: its num_classes is 10, but that of {tmp_path}/nine.pth is 9: give" in text


def half(directory: Path, labels: range, images: dict[str, int]) -> Path:
    """Writes images of Fashion-MNIST with these labels, which then start at 1."""
    directory.mkdir()
    names = json.loads((FASHION / "dataset.json").read_text())["class_names"][labels[0] - 1 : labels[-1]]
    declared = {"num_classes": len(names), "label_base": 1, "class_names": names}
    (directory / "dataset.json").write_text(json.dumps(declared))
    for split, count in images.items():
        source = Records.find(FASHION, split)
        found = (source.read(i) for i in range(len(source)))
        chosen = (record(image, label - labels[0] + 1) for image, label in found if label in labels)
        write_shard(directory / f"{split}-00000-of-00001", islice(chosen, count))
    return directory


@pytest.mark.full
@pytest.mark.skipif(not FASHION.exists(), reason="make train prepares it")
def test_fine_tuning_is_ahead_of_a_fresh_start(launch, tmp_path):
    """LeNet has seen half of Fashion-MNIST's classes; of the others it learns more in as many steps than a new one."""
    images = {"train": 30000, "validation": 5000}
    seen, others = half(tmp_path / "seen", range(1, 6), images), half(tmp_path / "others", range(6, 11), images)
    flags = ("--model=lenet", "--crop_area=0.9,1", "--eval_crop=1", "--learning_rate=0.05", "--batch_size=64")
    launch.train(*flags, f"--data_dir={seen}", f"--log_dir={tmp_path}/first", "--num_epochs=3")
    first = max((tmp_path / "first").glob("checkpoint-[0-9]*.pt"))
    top1 = {}
    for name, init in (("fresh", ()), ("fine", (f"--init={first}",))):
        said = launch.train(*flags, f"--data_dir={others}", f"--log_dir={tmp_path}/{name}", "--num_batches=60", *init)
        assert (f"fc2: 5 classes in {first}, 5 others here: made anew" in said) == (name == "fine")
        text = launch.run("launch/eval.py", f"--data_dir={others}", f"--log_dir={tmp_path}/{name}", "--json")
        top1[name] = json.loads(text.splitlines()[-1])["top1"]
    assert top1["fine"] > top1["fresh"] + 2, top1  # its standard error over 5 000 images is 0.6
