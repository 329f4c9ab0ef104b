"""Other programs load what export writes, and compute what the trainer computes."""

import json
import sys
from collections import Counter
from io import BytesIO

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

import nvcnn
from nvcnn.data.batch import prepare_input
from nvcnn.export import export
from nvcnn.models import Origin, Preprocessing
from nvcnn.models.fused import max_pool
from nvcnn.models.layers import BatchNorm2d, adaptive_average
from nvcnn.program import InputError
from nvcnn.settings import Export, parse
from nvcnn.weights import load_model, read
from tests.nvcnn.checkpoints import state_of
from tests.samples import picture

onnx, onnxruntime, timm = map(pytest.importorskip, ("onnx", "onnxruntime", "timm"))
safe_open = pytest.importorskip("safetensors").safe_open
load_file = pytest.importorskip("safetensors.torch").load_file
onnx_model = pytest.importorskip("nvcnn.onnx_graph").onnx_model


def exported(tmp_path, state: dict, format: str, *flags: str):
    """Returns the file that launch/export.py writes of a checkpoint, and the checkpoint."""
    path, out = tmp_path / "checkpoint.pt", tmp_path / f"out-{len(flags)}.{format}"
    torch.save(state, path)
    assert export(parse(Export, [f"--checkpoint={path}", f"--out={out}", f"--format={format}", *flags])) == 0
    return out, path


def images(size: int, count: int = 3) -> Tensor:
    """Returns decoded PNGs, uint8 (count, size, size, 3)."""
    files = (BytesIO(picture(i, mode="RGB", size=(size, size))) for i in range(count))
    return torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])


def loaded(path) -> nn.Module:
    """Returns the trainer's own model of a checkpoint, in evaluation."""
    return load_model(read("checkpoint", str(path), None, None))[0].eval()


@torch.no_grad()
def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """Returns a model's logits of images as they are prepared for training, in fp32."""
    flip = torch.zeros(len(pixels), dtype=torch.bool)
    return model(prepare_input(pixels, flip, dtype=torch.float32, normalize="imagenet"))


def own_class(model: str, **options) -> nn.Module:
    """Returns the model by torchvision's class; by timm's where that has none."""
    names = {"inception3": "inception_v3", "resnext50": "resnext50_32x4d"}
    if model in ("googlenet", "inception3"):
        options |= {"init_weights": False, "transform_input": False}
    if model in ("inception4", "inception-resnet2"):
        return timm.create_model({"inception4": "inception_v4"}.get(model, "inception_resnet_v2"), num_classes=10)
    return getattr(torchvision.models, names.get(model, model))(num_classes=10, **options)


SIZES = {"lenet": 28, "resnet18": 64, "googlenet": 96, "inception3": 107, "inception4": 107, "inception-resnet2": 107}


@pytest.mark.parametrize(
    ("model", "format", "options"),
    [
        ("resnet18", "torch", {"epsilon": 1e-5}),
        ("googlenet", "safetensors", {"aux": True}),
        pytest.param("inception3", "torch", {"aux": True}, marks=pytest.mark.full),
        pytest.param("inception4", "safetensors", {}, marks=pytest.mark.full),
        pytest.param("inception-resnet2", "torch", {}, marks=pytest.mark.full),
    ],
)
def test_the_publishers_class_loads_it(model, format, options, tmp_path):
    """All names, and to the same logits once its epsilon is that which the file names."""
    size = 299 if (model, "aux") == ("inception3", *options) else SIZES[model]
    out, path = exported(tmp_path, state_of(model, options=options, size=size), format)
    if format == "torch":
        told = torch.load(out, weights_only=True)
        weights, epsilon = told["state_dict"], told["options"]["epsilon"]
    else:
        with safe_open(out, "pt") as file:
            weights, epsilon = load_file(out), json.loads(file.metadata()["options"])["epsilon"]
    theirs = own_class(model, **({"aux_logits": True} if "aux" in options else {})).eval()
    theirs.load_state_dict(weights, strict=True)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = epsilon
    pixels = images(size)
    ours = logits(loaded(path), pixels)
    assert (logits(theirs, pixels) - ours).abs().max() < 1e-4 * ours.abs().max()


@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_timm_loads_the_file_itself(format, tmp_path):
    out, path = exported(tmp_path, state_of("resnet18", options={"epsilon": 1e-5}, size=64), format)
    theirs = timm.create_model("resnet18", num_classes=10, checkpoint_path=str(out)).eval()
    weights = read("checkpoint", str(path), None, None).tensors
    assert all(torch.equal(tensor, weights[name]) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_what_was_exported_is_read_again(format, tmp_path):
    """Fine-tuning or evaluation may begin with it; the flags of images are taken into the file."""
    state = state_of("resnet18", 3, {"epsilon": 1e-3}, 32, class_names=["a", "b", "ö"])
    out, path = exported(tmp_path, state, format, "--image_size=64", "--eval_aspect=keep")
    weights, before = (read("init", str(file), "resnet18", None) for file in (out, path))
    assert weights.origin == Origin(Preprocessing(64, "imagenet", 1.0, "keep"), {"epsilon": 1e-3})
    assert (weights.model, weights.num_classes, weights.class_names) == ("resnet18", 3, ("a", "b", "ö"))
    assert (weights.publisher, weights.dtype, weights.step) == ("nvcnn", torch.float32, None)
    model, lines = load_model(weights)
    assert lines == []
    assert all(torch.equal(tensor, before.tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "fold"),
    [
        *[("lenet", False), ("resnet18", True)],
        pytest.param("resnet18", False, marks=pytest.mark.full),
        *[pytest.param("inception3", fold, marks=pytest.mark.full) for fold in (False, True)],
        *[pytest.param("googlenet", fold, marks=pytest.mark.full) for fold in (False, True)],
        *[pytest.param("inception-resnet2", fold, marks=pytest.mark.full) for fold in (False, True)],
    ],
)
def test_onnx_runtime_computes_the_trainers_logits(model, fold, tmp_path, capsys):
    """Of decoded images, one or more. Both sum in fp32, but not in the same order."""
    size, names = SIZES[model], [f"class {i}" for i in range(10)]
    state = state_of(model, options={"epsilon": 1e-3}, size=size, class_names=names)
    out, path = exported(tmp_path, state, "onnx", "--eval_interpolation=bicubic", *["--fold"] * fold)
    assert capsys.readouterr().out.startswith("Weights:")  # no progress of the exporter
    made, own = onnx.load(out), loaded(path)
    onnx.checker.check_model(made, full_check=True)
    assert [(opset.domain, opset.version) for opset in made.opset_import] == [("", 18)]
    assert not any(node.metadata_props for node in made.graph.node)  # no paths of the machine
    kinds = Counter(node.op_type for node in made.graph.node)
    norms = sum(isinstance(module, BatchNorm2d) for module in own.modules())
    assert kinds["BatchNormalization"] == (0 if fold else norms)

    session = onnxruntime.InferenceSession(out)
    for count in (1, 3):
        pixels = images(size, count)
        (found,) = session.run(["logits"], {"images": pixels.numpy()})
        expected = logits(own, pixels)
        assert np.abs(found - expected.numpy()).max() < 1e-5 * expected.abs().max()
    assert expected.std(0).max() > 1e-2 * expected.abs().max()  # the images count
    told = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert told == {
        "nvcnn": nvcnn.__version__,
        "model": model,
        "num_classes": 10,
        "class_names": names,
        "preprocessing": {
            "image_size": size,
            "normalize": "imagenet",
            "eval_crop": 1.0,
            "eval_aspect": "stretch",
            "eval_interpolation": "bicubic",
            "train_size": None,
        },
        "options": {"epsilon": 1e-3},
    }


class Regions(nn.Module):
    """Its means are of regions of different sizes, which overlap, also in the last of its poolings.

    For 24 pixels the windows of its maxima stick out; for 15 there are 7 x 7 means already.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = max_pool(F.avg_pool2d(x, 3, 1, 1), 3, stride=2, ceil_mode=True)
        x = adaptive_average(adaptive_average(x, 7), 3)
        return torch.flatten(torch.add(x, x, alpha=0.5), 1)


@pytest.mark.parametrize("size", [5, 15, 24])
def test_pooling(size):
    model, pixels = Regions(), images(size)
    made = onnx_model(model, image_size=size, normalize="imagenet", fold=False, metadata={})
    (found,) = onnxruntime.InferenceSession(made.SerializeToString()).run(None, {"images": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits(model, pixels), rtol=1e-5, atol=1e-5)


def refused(message: str, *flags: str) -> None:
    with pytest.raises(InputError) as error:
        export(parse(Export, flags))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_cannot_be_done_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    torch.save(state_of("lenet"), path)
    given, out = f"--checkpoint={path}", f"--out={tmp_path}/out"
    refused("--out", given)
    refused("give one of --log_dir", out)
    refused("--fold is for --format=onnx", given, out, "--fold")
    refused(f"{path}: is there already", given, f"--out={path}")
    refused("there is no directory", given, f"--out={tmp_path}/absent/out")
    refused("no such file", f"--checkpoint={tmp_path}/absent.pt", out)
    for flag in ("--image_size=32", "--eval_size=32"):
        refused(f"{flag}: --model=lenet takes 28 alone", given, out, flag)
    for format, package in (("onnx", "onnx"), ("safetensors", "safetensors")):
        for name in [name for name in sys.modules if name.startswith((package, "nvcnn.onnx_graph"))]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        refused(f"pip install {package}", given, out, f"--format={format}")
    monkeypatch.setattr("nvcnn.checkpoint.os.fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left")))
    refused("cannot be written (No space left)", given, out, "--format=torch")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
