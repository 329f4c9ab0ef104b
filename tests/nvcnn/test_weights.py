"""Weights come in as their publishers have them, or an error of one line says why not."""

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from nvcnn.models import MODELS, ORIGINS, Origin, Preprocessing, build_model
from nvcnn.optimizer.arena import misfit
from nvcnn.plan import plan
from nvcnn.program import InputError
from nvcnn.settings import Settings
from nvcnn.weights import fit, foreign, load_model, read, skeleton
from tests.nvcnn.checkpoints import state_of, weights_of

timm = pytest.importorskip("timm")
save_file = pytest.importorskip("safetensors.torch").save_file

TORCHVISION = {"inception3": "inception_v3", "resnext50": "resnext50_32x4d"}
TIMM = {"inception3": "inception_v3", "inception4": "inception_v4", "inception-resnet2": "inception_resnet_v2"}
TIMM |= {"resnext50": "resnext50_32x4d", "resnext101": "resnext101_32x4d"}
PUBLISHED = [(who, model) for who, models in ORIGINS.items() for model in models]


def published(who: str, model: str, num_classes: int = 1000) -> torch.nn.Module:
    """Returns the publisher's own model with random weights, in evaluation."""
    torch.manual_seed(0)
    if who == "timm":
        return timm.create_model(TIMM.get(model, model), num_classes=num_classes).eval()
    options = {"init_weights": False} if model in ("googlenet", "inception3") else {}
    return getattr(torchvision.models, TORCHVISION.get(model, model))(num_classes=num_classes, **options).eval()


def lenet(num_classes: int = 10, seed: int = 7) -> dict[str, Tensor]:
    return build_model("lenet", num_classes=num_classes, seed=seed).state_dict()


@pytest.mark.parametrize(("who", "model"), PUBLISHED)
def test_what_is_published_fits(who, model, tmp_path):
    """Names and shapes, auxiliary heads aside."""
    with torch.device("meta"):
        theirs = published(who, model).state_dict()
    weights = foreign(tmp_path, theirs, model, who)
    assert (weights.publisher, weights.num_classes, weights.origin) == (who, 1000, ORIGINS[who][model])
    with torch.device("meta"):
        ours = build_model(model, num_classes=1000, seed=0, **weights.origin.options).state_dict()
    heads = set()
    if "aux" in MODELS[model].flags:
        heads = skeleton(model, aux=True).state_dict().keys() - ours.keys()
    assert misfit(ours, {name: t for name, t in weights.tensors.items() if name not in heads}) is None


@pytest.mark.parametrize(
    ("who", "model", "size"), [("torchvision", "resnet18", 64), ("torchvision", "alexnet", 224), ("timm", "vgg11", 64)]
)
def test_logits_are_the_publishers(who, model, size, tmp_path):
    theirs = published(who, model, num_classes=10)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 1e-5, 2)  # epsilon counts
    ours, lines = load_model(foreign(tmp_path, theirs.state_dict(), model, who))
    x = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert lines == []


@pytest.mark.parametrize(
    "kind", ["zip", "legacy", "timm", "torchvision", "ddp", "safetensors", "renamed", "fp16", "bf16", "fp64"]
)
def test_the_file_may_be_of_any_kind(kind, tmp_path):
    expected, path = lenet(), tmp_path / "weights.pth"
    if kind == "legacy":
        torch.save(expected, path, _use_new_zipfile_serialization=False)
    elif kind in ("timm", "torchvision"):
        torch.save({"epoch": 3, {"timm": "state_dict", "torchvision": "model"}[kind]: expected}, path)
    elif kind == "ddp":
        torch.save({f"module.{name}": tensor for name, tensor in expected.items()}, path)
    elif kind in ("safetensors", "renamed"):
        path = path if kind == "renamed" else tmp_path / "weights.safetensors"
        save_file(expected, path, metadata={"format": "pt"})
    else:
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}.get(kind, torch.float32)
        torch.save({name: tensor.to(dtype) for name, tensor in expected.items()}, path)
        expected = {name: tensor.to(dtype).float() for name, tensor in expected.items()}
    weights = read("init", str(path), "lenet", "nvcnn")
    assert weights.origin == Origin(Preprocessing(28), {})
    assert str(weights) == f"{path}, nvcnn's lenet"
    model, lines = load_model(weights)
    assert lines == []
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_tells_everything(tmp_path):
    path = tmp_path / "checkpoint-00000009.pt"
    torch.save(state_of("lenet", 5, class_names=list("abcde")), path)
    for model, who in ((None, None), ("lenet", "nvcnn")):
        weights = read("checkpoint", str(path), model, who)
        assert weights.origin == Origin(Preprocessing(28, "imagenet", 1.0), {})
        assert (weights.publisher, weights.model, weights.num_classes) == ("nvcnn", "lenet", 5)
        assert (weights.class_names, weights.label_base, weights.step) == (tuple("abcde"), 3, 9)
        assert weights.dtype == torch.float16


def test_the_averages_of_a_checkpoint_come_first(tmp_path):
    path, other = tmp_path / "checkpoint-00000009.pt", lenet(seed=8)
    torch.save(state_of("lenet", ema=other), path)
    averaged, raw = (read("checkpoint", str(path), None, None, ema) for ema in (True, False))
    assert torch.equal(averaged.tensors["conv1.weight"], other["conv1.weight"])
    assert torch.equal(raw.tensors["conv1.weight"], weights_of("lenet", 10, 28)["conv1.weight"])
    assert str(averaged) == f"{path}, nvcnn's lenet, the averaged weights"
    assert str(raw) == f"{path}, nvcnn's lenet, not the averaged weights"


def test_a_head_for_other_classes_is_made_anew(tmp_path):
    theirs = published("torchvision", "resnet18").state_dict()
    del theirs["bn1.num_batches_tracked"]  # as in old files
    weights = foreign(tmp_path / "w.pth", theirs, "resnet18", "torchvision")
    model = build_model("resnet18", num_classes=10, seed=1)
    head = model.fc.weight.clone()
    assert fit(model, weights) == [f"fc: 1000 classes in {tmp_path}/w.pth, 10 here: made anew"]
    assert torch.equal(model.fc.weight, head)
    assert torch.equal(model.layer4[1].conv2.weight, theirs["layer4.1.conv2.weight"])


@pytest.mark.parametrize(
    ("here", "anew"), [(None, False), (["a", "b", "c"], False), (["a", "c", "b"], True), (["x", "y", "z"], True)]
)
def test_a_head_for_classes_of_other_names_is_made_anew(here, anew, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(state_of("lenet", 3, class_names=["a", "b", "c"]), path)
    weights = read("init", str(path), "lenet", None)
    model = build_model("lenet", num_classes=3, seed=1)
    assert fit(model, weights, here) == [f"fc2: 3 classes in {path}, 3 others here: made anew"] * anew
    assert torch.equal(model.fc2.weight, weights.tensors["fc2.weight"]) != anew
    assert torch.equal(model.conv1.weight, weights.tensors["conv1.weight"])


def test_auxiliary_heads_follow_the_flag(tmp_path):
    """Those of the file are left out without --aux; those that it lacks are made anew."""
    tensors = weights_of("googlenet", 7, 96, aux=True)
    weights = foreign(tmp_path / "w.pth", tensors, "googlenet", "torchvision")
    model = build_model("googlenet", num_classes=7, seed=1)
    assert fit(model, weights) == [f"auxiliary heads: left out of what {tmp_path}/w.pth has"]
    assert torch.equal(model.fc.weight, tensors["fc.weight"])
    without = replace(weights, tensors=model.state_dict())
    model = build_model("googlenet", num_classes=7, seed=1, aux=True)
    assert fit(model, without) == [f"auxiliary heads: none in {tmp_path}/w.pth, made anew"]
    assert torch.equal(model.fc.weight, tensors["fc.weight"])
    model = build_model("googlenet", num_classes=7, seed=1, aux=True)
    assert fit(model, weights) == []
    assert torch.equal(model.aux1.fc1.weight, tensors["aux1.fc1.weight"])
    model = build_model("googlenet", num_classes=5, seed=1, aux=True)
    heads = [line.partition(":")[0] for line in fit(model, weights)]
    assert heads == ["aux1.fc2", "aux2.fc2", "fc"]


def test_heads_are_this_run_s_own():
    """Auxiliary heads follow --aux; what else the weights were trained with stays."""
    settings = Settings(model="resnet50")
    options = {"aux": True, "resnet_v1": True, "epsilon": 1e-5}
    run = plan(settings, None, 1, Origin(Preprocessing(160, "imagenet"), options))
    assert run.options == {"resnet_v1": True, "epsilon": 1e-5}
    assert run.preprocessing == Preprocessing(160, "imagenet")
    asked = Settings(model="resnet50", image_size=96, eval_aspect="keep")
    assert plan(asked, None, 1, Origin(run.preprocessing, {})).preprocessing == Preprocessing(
        96, "imagenet", eval_aspect="keep"
    )


@pytest.mark.parametrize(
    ("flags", "begun_with", "sizes"),
    [
        ({}, Preprocessing(224), (224, 224)),
        ({}, Preprocessing(256, train_size=192), (192, 256)),
        ({"image_size": 160}, Preprocessing(256, train_size=192), (160, 160)),
        ({"eval_size": 256}, Preprocessing(224), (224, 256)),
        ({"eval_size": 256, "image_size": 160}, Preprocessing(224), (160, 256)),
        ({"eval_size": 192}, Preprocessing(256, train_size=192), (192, 192)),
        ({"train_size": "160"}, Preprocessing(224), (160, 224)),
        ({"train_size": "160"}, Preprocessing(256, train_size=192), (160, 256)),
        ({"train_size": "160", "image_size": 128, "eval_size": 256}, Preprocessing(224), (160, 256)),
    ],
)
def test_sizes_in_training_and_evaluation(flags, begun_with, sizes):
    """--image_size is both, the others one. A resumed run, which begins with what it said itself, has the same."""
    for _ in range(2):
        run = plan(Settings(model="resnet18", **flags), None, 1, Origin(begun_with, {}))
        assert (*run.sizes, run.preprocessing.image_size) == sizes
        begun_with = run.preprocessing


def changed(**tensors) -> dict[str, Tensor]:
    return lenet() | {name.replace("_", "."): tensor for name, tensor in tensors.items()}


LACKS_ONE = {name: tensor for name, tensor in lenet().items() if name != "conv2.bias"}
UNFIT = [
    (LACKS_ONE, "lenet", "nvcnn", "the file lacks conv2.bias"),
    (changed(conv3_bias=torch.zeros(3)), "lenet", "nvcnn", "has the unknown conv3.bias"),
    (changed(conv1_bias=torch.zeros(3)), "lenet", "nvcnn", "conv1.bias is (3,) in the file, (32,) in the model"),
    (changed(fc2_bias=torch.zeros(9)), "lenet", "nvcnn", "fc2.bias is (9,) in the file"),
    (changed(conv1_bias=torch.full((32,), torch.nan)), "lenet", "nvcnn", "conv1.bias has values that"),
    (
        changed(conv1_bias=torch.full((32,), 1e99, dtype=torch.float64)),
        "lenet",
        "nvcnn",
        "conv1.bias has values that are not fin",
    ),
    (changed(conv1_bias=torch.zeros(32, dtype=torch.int8)), "lenet", "nvcnn", "conv1.bias is torch.int8"),
    (lenet(), "resnet18", "timm", "the file lacks fc.weight"),
    (lenet(), "lenet", None, "give --weights_from=nvcnn"),
    (lenet(), "lenet", "timm", "cannot be timm's lenet; give --weights_from=nvcnn"),
    (lenet(), None, None, "give --model"),
    ({"fc.weight": torch.zeros(9, 9)}, "resnet18", None, "give --weights_from=nvcnn|torchvision|timm"),
    ({"fc.weight": torch.zeros(9, 9)}, "resnext101", "torchvision", "give --weights_from=nvcnn|timm"),
    ({"head.fc.weight": torch.zeros(9, 9)}, "vgg11", "torchvision", "give --weights_from=timm"),
    ({"classifier.6.weight": torch.zeros(9, 9)}, "vgg11", "timm", "give --weights_from=nvcnn|torchvision"),
    ({}, "lenet", "nvcnn", "holds no tensors"),
    ({"fc.weight": 3}, "lenet", "nvcnn", "not a dictionary of tensors"),
    ([torch.zeros(3)], "lenet", "nvcnn", "not a dictionary of tensors"),
    (torch.zeros(3), "lenet", "nvcnn", "not a dictionary of tensors"),
    (state_of("lenet", 10), "trivial", None, "holds lenet, not --model=trivial"),
    (state_of("lenet", 10), "lenet", "timm", "is nvcnn's own, not --weights_from=timm"),
    (state_of("lenet", 10, version=99), "lenet", None, "checkpoint version 99"),
    (state_of("lenet", 10, preprocessing={}), "lenet", None, "its description is damaged"),
    ({"format": "nvcnn weights", "version": 99}, "lenet", None, "weights version 99"),
    ({"format": "nvcnn weights", "version": 1}, "lenet", None, "its description is damaged"),
    # Of strangers: a few bytes for a tensor, or a network, of 2**40 numbers.
    (changed(fc2_weight=torch.zeros(1).expand(2**40, 512)), "lenet", "nvcnn", "tensors that are not stored as they"),
    (changed(fc2_weight=torch.zeros(2**20, 512, device="meta")), "lenet", "nvcnn", "are not stored as they are;"),
    (changed(fc2_weight=torch.zeros(3, 512).to_sparse()), "lenet", "nvcnn", "tensors that are not stored as"),
    (state_of("lenet", 10) | {"num_classes": 2**40}, "lenet", None, "its weights are not of 1099511627776 classes"),
    (state_of("lenet", 10) | {"options": {"width": 2**40}}, "lenet", None, ": its description is damaged"),
    (state_of("lenet", 10) | {"preprocessing": {"image_size": 2**40}}, "lenet", None, "its description is damaged; w"),
    (state_of("lenet", 10) | {"class_names": [3]}, "lenet", None, "its description is damaged;"),
]


def test_a_file_that_unpacks_to_more_than_it_is(tmp_path):
    """torch.load takes the memory that a zip archive says its parts have."""
    torch.save(lenet(), tmp_path / "stored.pth")
    with (
        zipfile.ZipFile(tmp_path / "stored.pth") as stored,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
        packed.writestr("archive/data/99", bytes(10_000_000))
    with pytest.raises(InputError, match="its parts are larger than the file"):
        read("init", str(tmp_path / "packed.pth"), "lenet", "nvcnn")


@pytest.mark.parametrize(("content", "model", "who", "message"), UNFIT, ids=[case[3] for case in UNFIT])
def test_what_does_not_fit_is_one_line(content, model, who, message, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    with pytest.raises(InputError) as error:
        load_model(read("init", str(path), model, who))
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("damage", ["absent", "directory", "empty", "text", "truncated", "pickle", "description"])
def test_what_cannot_be_read_is_one_line(damage, suffix, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    if damage == "directory":
        path.mkdir()
    elif damage in ("truncated", "description"):
        if suffix == "pth":
            torch.save(lenet() if damage == "truncated" else state_of("lenet", 10, settings=None), path)
        else:
            save_file(lenet(), path, metadata={"nvcnn": "{"})
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:-100])
    elif damage != "absent":
        path.write_bytes({"empty": b"", "text": b"hello", "pickle": pickle.dumps(Settings(model="lenet"))}[damage])
    with pytest.raises(InputError) as error:
        read("init", str(path), "lenet", "nvcnn")
    assert str(error.value).startswith(f"--init={path}: ")
    assert "\n" not in str(error.value)


def test_safetensors_may_be_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        read("init", str(tmp_path / "w.safetensors"), "lenet", "nvcnn")


@pytest.mark.parametrize("model", ORIGINS["torchvision"])
def test_torchvision_prepares_images_so(model):
    """ORIGINS has what its DEFAULT weights are evaluated with."""
    transform = torchvision.models.get_model_weights(TORCHVISION.get(model, model)).DEFAULT.transforms()
    origin = ORIGINS["torchvision"][model].preprocessing
    assert (transform.crop_size, transform.resize_size) == (
        [origin.image_size],
        [round(origin.image_size / origin.eval_crop)],
    )
    assert (origin.eval_aspect, origin.eval_interpolation) == ("keep", transform.interpolation.value)
    # The Inceptions take ImageNet's, and change them to [-1, 1] inside of the network.
    inside = model in ("googlenet", "inception3")
    assert origin.normalize == ("signed" if inside else "imagenet")
    assert transform.mean == [0.485, 0.456, 0.406]


@pytest.mark.parametrize("model", ORIGINS["timm"])
def test_timm_prepares_images_so(model):
    """ORIGINS has what the weights are evaluated with that timm loads by the name of the model alone."""
    told = timm.get_pretrained_cfg(TIMM.get(model, model))
    origin = ORIGINS["timm"][model].preprocessing
    assert told.mean == ((0.5,) * 3 if origin.normalize == "signed" else (0.485, 0.456, 0.406))
    assert (told.input_size, told.interpolation) == (
        (3, origin.image_size, origin.image_size),
        origin.eval_interpolation,
    )
    assert int(origin.image_size / told.crop_pct) == round(origin.image_size / origin.eval_crop)


@pytest.mark.parametrize(("who", "model"), PUBLISHED)
def test_epsilon_is_the_publishers(who, model):
    with torch.device("meta"):
        norms = [m.eps for m in published(who, model).modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert set(norms) == ({ORIGINS[who][model].options["epsilon"]} if norms else set())


def test_the_page_has_the_table_of_origins():
    rows: dict[str, list[str]] = {}
    for who, model in PUBLISHED:
        origin = ORIGINS[who][model]
        built = ", ".join(f"{option}={value}" for option, value in origin.options.items())
        rows.setdefault(f"| {who} | {{}} | {origin.preprocessing} | {built} |", []).append(model)
    table = [row.format(", ".join(models)) for row, models in rows.items()]
    page = (Path(__file__).parents[2] / "docs" / "weights.md").read_text().splitlines()
    first = page.index("| whose | networks | images | built with |") + 2
    assert page[first : page.index("", first)] == table, "\n".join(table)
