"""A plan follows from settings, data and ranks."""

import re
from dataclasses import replace

import pytest
import torch

from nvcnn.data.dataset import find_dataset
from nvcnn.models import MODELS, Preprocessing
from nvcnn.plan import dry_run, estimates, find_validation_data, initial_model, plan
from nvcnn.program import InputError
from nvcnn.settings import Settings
from tests.samples import write_split


def test_epochs_are_whole_batches(tmp_path, small_dataset):
    settings = Settings(model="lenet", data_dir=str(small_dataset), batch_size=4, num_epochs=3, num_classes=10)
    dataset = find_dataset(small_dataset, num_classes=10, label_base=None, split="train")
    run = plan(settings, dataset, ranks=2)
    assert (run.images, run.total_batch, run.steps_per_epoch, run.steps) == (30, 8, 3, 9)
    several = plan(replace(settings, accumulate=3), dataset, ranks=1)
    assert (several.total_batch, several.steps_per_epoch, several.steps) == (12, 2, 6)
    with pytest.raises(InputError, match=r"total batch of 32 \(1 ranks x --batch_size=4 x --accumulate=8\)"):
        plan(replace(settings, accumulate=8), dataset, ranks=1)
    with pytest.raises(InputError, match=r"30 training images .* 32 \(8 ranks x --batch_size=4\)"):
        plan(settings, dataset, ranks=8)


def test_a_set_to_test_on_without_labels_need_not_be_evaluated_on(tmp_path):
    write_split(tmp_path, "train", images=4, shards=1)
    write_split(tmp_path, "test", images=4, shards=1, label=lambda i: -1)
    settings = Settings(model="lenet", data_dir=str(tmp_path))
    with pytest.raises(InputError, match=r"test-0.*: label -1 is outside 1 .. 1000: .*; or give --eval_every=0$"):
        find_validation_data(settings)
    assert find_validation_data(replace(settings, eval_every=0)) is None


@pytest.mark.parametrize(
    ("model", "ranks", "rate"),
    [("resnet50", 8, 2.0), ("resnet18", 8, 2.0), ("lenet", 8, 0.05), ("overfeat", 8, 0.001), ("resnet34", 1, 0.25)],
)
def test_default_learning_rates(model, ranks, rate):
    assert plan(Settings(model=model, batch_size=256), None, ranks).learning_rate == rate
    assert plan(Settings(model=model, batch_size=64, accumulate=4), None, ranks).learning_rate == rate
    assert plan(Settings(model=model, learning_rate=0.7), None, ranks).learning_rate == 0.7


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({}, 0),
        ({"warmup_epochs": 0.5}, 15),
        ({"schedule": "onecycle"}, 9),
        ({"warmup_epochs": 0, "schedule": "onecycle"}, 0),
    ],
)
def test_the_warm_up_is_counted_in_steps(flags, steps):
    assert plan(Settings(model="lenet", num_batches=30, **flags), None, ranks=2).warmup == steps


def test_zero_gamma_is_how_a_model_begins_and_not_what_it_is():
    settings = Settings(model="resnet18", num_classes=10, zero_gamma=True)
    run = plan(settings, None, ranks=1)
    model, _ = initial_model(settings, run, None)
    assert not model.layer1[0].bn2.weight.any()
    assert run.options == {}  # which a checkpoint keeps


def test_synthetic_data_is_one_epoch():
    run = plan(Settings(model="resnet50", batch_size=16, num_batches=30, fp16=True), None, ranks=4)
    assert (run.steps, run.steps_per_epoch, run.num_classes, run.dtype) == (30, 30, 1000, torch.float16)


@pytest.mark.parametrize(
    ("epochs", "asked", "sizes", "trained_at", "line"),
    [
        (
            6,
            "32:2,48:3,40",
            ((0, 32), (2, 48), (5, 40)),
            40,
            "32 x 32 in epochs 1 to 2, 48 x 48 in epochs 3 to 5, 40 x 40 in epoch 6",
        ),
        (1, "32", ((0, 32),), 32, None),
    ],
)
def test_sizes_by_epochs(small_dataset, capsys, monkeypatch, epochs, asked, sizes, trained_at, line):
    """The dry run says them, and memory for the largest."""
    data = {"data_dir": str(small_dataset), "batch_size": 10, "num_epochs": epochs, "eval_every": 0}
    settings = Settings(model="resnet18", train_size=asked, image_size=40, **data)
    dataset = find_dataset(small_dataset, num_classes=10, label_base=None, split="train")
    run = plan(settings, dataset, ranks=1)
    assert (run.image_sizes, run.preprocessing) == (sizes, Preprocessing(40).trained_at(trained_at))
    largest = max(run.sizes)
    monkeypatch.setattr("nvcnn.plan.MOST_PIXELS", 10 * largest**2)
    with pytest.raises(InputError, match=f"too many images of {largest} x {largest} pixels"):
        plan(settings, dataset, ranks=1)
    monkeypatch.undo()
    dry_run(settings, run)
    lines = capsys.readouterr().out.splitlines()
    assert [text for text in lines if text.startswith("Sizes:")] == [f"Sizes:       {line}"] * bool(line)
    assert {f"--train_size={asked}", "--image_size=40", "--eval_size=40"} <= set(lines)
    settings = Settings(model="resnet18", image_size=largest, **data)
    dry_run(settings, plan(settings, dataset, ranks=1))
    assert next(text for text in lines if text.startswith("Memory:")) in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("length", "asked", "has"),
    [
        ({"num_epochs": 2}, "32:2,48", "2"),
        ({"num_batches": 4}, "32:2,48:5,64", "1.33333"),
        ({"num_batches": 4}, "32:1,48", None),
    ],
)
def test_a_size_that_the_run_does_not_come_to_is_refused(small_dataset, length, asked, has):
    settings = Settings(model="resnet18", data_dir=str(small_dataset), batch_size=10, train_size=asked, **length)
    dataset = find_dataset(small_dataset, num_classes=10, label_base=None, split="train")
    if has is None:
        assert plan(settings, dataset, ranks=1).sizes == [32, 48]
        return
    with pytest.raises(InputError, match=f"--train_size={asked}: 48 begins after epoch 2, the run has {has}: change"):
        plan(settings, dataset, ranks=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 32_769}, "--num_classes=32769: 32769 classes: must be at most 32768"),
        ({"num_classes": 1}, "^--num_classes=1: one class is nothing to learn"),
        ({"num_batches": 2_000_000_000}, "--num_batches=2000000000: 2000000000 steps: must be at most"),
        ({"warmup_epochs": 1.1, "num_batches": 10}, "--warmup_epochs=1.1: the run has 1 epochs: lower it"),
        ({"batch_size": 2**31 // 28**2 + 1}, "--batch_size=2739138: too many images of 28 x 28 pixels"),
    ],
)
def test_more_than_there_can_be_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        plan(Settings(model="lenet", **settings), None, ranks=1)


@pytest.mark.parametrize(
    ("flags", "flag"), [({"image_size": 32}, "image_size"), ({"image_size": 64, "train_size": "32"}, "train_size")]
)
def test_a_batch_norm_of_one_value_a_channel_is_refused(flags, flag):
    """But not where all are frozen, and no more with 33 x 33, which leaves 2 x 2 pixels."""
    settings = Settings(model="resnet18", batch_size=1, num_classes=9, **flags)
    said = rf"^--batch_size=1: with images of 32 x 32, .* at least 2 values .*, got 1: raise --batch_size, or --{flag}$"
    with pytest.raises(InputError, match=said):
        initial_model(settings, plan(settings, None, 8), None)
    for other in ({"batch_size": 2}, {"freeze": "backbone", "init": "w.pth"}, {"image_size": 33, "train_size": None}):
        enough = replace(settings, **other)
        initial_model(enough, plan(enough, None, 8), None)


@pytest.mark.usefixtures("without_estimates")
def test_dry_run_says_what_a_user_plans_by(capsys):
    settings = Settings(model="resnet50", batch_size=256, fp16=True, learning_rate=2.0, dry_run=True)
    dry_run(settings, plan(settings, None, ranks=8))
    out = capsys.readouterr().out
    for line in ("--model=resnet50", "--learning_rate=2.0", "Batch size:  256 per device, 2048 total"):
        assert line in out.splitlines()
    assert "Parameters:  25,557,032" in out
    assert "on this CPU" not in out  # that is measured where training is
    assert "GiB a device" in out


def test_dry_run_says_how_long_it_takes_at_least(capsys):
    settings = Settings(model="resnet50", batch_size=256, fp16=True, num_epochs=90, num_images=1_281_167, dry_run=True)
    dry_run(settings, plan(settings, None, ranks=1))
    out = capsys.readouterr().out
    assert "Num images:  1281167, assumed" in out
    assert "MACs:        4.089 G (224 x 224) forward" in out
    assert re.search(r"H100 as measured +9,056 +3 h 32 min +27 min\n", out)  # 90 epochs x 1 281 167 / 9 056 / s
    # docs/performance.md, "What a step must take": 12 290 images/s at most on a H100, 220 MB an image
    assert 12_200 < int(re.search(r"H100 at least +([\d,]+) ", out)[1].replace(",", "")) < 12_400
    assert out.index("A100 at least") < out.index("H100 at least") < out.index("H200 at least") < out.index("B200 at")


def test_each_size_has_its_share_of_the_steps():
    asked = {"num_epochs": 8, "train_size": "160:3,192:3,160", "num_images": 256, "dry_run": True}
    run = plan(Settings(model="resnet50", **asked), None, ranks=2)
    assert run.shares == {160: 5 / 8, 192: 3 / 8}
    assert plan(Settings(model="resnet50"), None, ranks=2).shares == {224: 1}


def test_what_is_frozen_takes_less():
    both = [Settings(model="lenet", **flags) for flags in ({}, {"freeze": "backbone", "init": "w.pth"})]
    rates = [int(estimates(s, plan(s, None, ranks=1))[-1].split()[3].replace(",", "")) for s in both]
    assert rates[1] > 1.5 * rates[0]


def test_a_dry_run_of_epochs_needs_to_know_the_images():
    with pytest.raises(InputError, match=r"--num_epochs needs --data_dir.*--num_images"):
        Settings(model="lenet", num_epochs=2, dry_run=True)
    with pytest.raises(InputError, match="--num_epochs needs --data_dir"):
        Settings(model="lenet", num_epochs=2, num_images=100)  # of a real run the data say it
    settings = Settings(model="lenet", num_epochs=2, num_images=100, dry_run=True)
    assert plan(settings, None, ranks=1).steps == 2
    with pytest.raises(InputError, match="--num_images: 100 training images are fewer"):
        plan(settings, None, ranks=2)


@pytest.fixture
def without_estimates(monkeypatch):
    """Leaves out what takes a dry run seconds."""
    monkeypatch.setattr("nvcnn.plan.estimates", lambda *_: [])


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


# By hand: parameters; values of an image that autograd keeps, with a dropout's factors; places in windows, of a byte.
LENET = (
    32 * 76 + 64 * 801 + 512 * 3137 + 1000 * 513,
    3 * 28 * 28 + (32 + 64) * 14 * 14 + 32 * 28 * 28 + 64 * 7 * 7 + 512,
    32 * 14 * 14 + 64 * 7 * 7,
)
ALEXNET = (
    64 * 364 + 192 * 1601 + 384 * 1729 + 256 * (3457 + 2305) + 4096 * (9217 + 4097) + 1000 * 4097,
    3 * 227**2 + 64 * (55**2 + 27**2) + 192 * (27**2 + 13**2) + (384 + 2 * 256) * 13**2 + 2 * 256 * 6**2 + 4 * 4096,
    64 * 27**2 + 192 * 13**2 + 256 * 6**2,
)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.usefixtures("without_estimates")
def test_dry_run_of_every_model(capsys, model):
    settings = Settings(model=model, batch_size=256)
    with torch.device("meta"):  # nothing asks for the values
        dry_run(settings, plan(settings, None, ranks=1))
    lines = capsys.readouterr().out.splitlines()
    parameters = next(line for line in lines if line.startswith("Parameters:"))
    memory = next(line for line in lines if line.startswith("Memory:"))
    assert re.fullmatch(r"Parameters:  [\d,]+", parameters)
    assert re.match(
        r"Memory:      about [\d.]+ GiB a device: [\d.]+ weights and optimizer, [\d.]+ activations;", memory
    )
    if known := {"lenet": LENET, "alexnet": ALEXNET}.get(model):
        count, values, windows = known
        state, activations = 12 * count, 256 * (4 * values + windows)
        assert parameters == f"Parameters:  {count:,}"
        assert re.findall(r"\d+\.\d+", memory) == [gib(state + activations), gib(state), gib(activations)]


@pytest.mark.parametrize(("momentum", "ema", "size"), [("fp32", None, 12), ("bf16", None, 10), ("fp32", 0.9, 16)])
@pytest.mark.usefixtures("without_estimates")
def test_dry_run_counts_momentum_in_its_dtype_and_the_average(capsys, momentum, ema, size):
    settings = Settings(model="resnet152", batch_size=1, fp16=True, momentum_dtype=momentum, ema=ema)
    dry_run(settings, plan(settings, None, ranks=1))
    out = capsys.readouterr().out
    parameters = int(re.search(r"Parameters:  ([\d,]+)", out)[1].replace(",", ""))
    assert f"{size * parameters / 2**30:.2f} weights and optimizer" in out
