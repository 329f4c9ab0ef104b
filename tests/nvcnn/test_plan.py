"""A plan follows from settings, data and ranks."""

import re
from dataclasses import replace

import pytest
import torch

from nvcnn.data.dataset import find_dataset
from nvcnn.models import MODELS
from nvcnn.plan import dry_run, initial_model, plan
from nvcnn.program import InputError
from nvcnn.settings import Settings


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


@pytest.mark.parametrize(
    ("model", "ranks", "rate"), [("resnet50", 8, 2.0), ("resnet18", 8, 0.5), ("lenet", 8, 0.001), ("resnet34", 1, 0.25)]
)
def test_default_learning_rates(model, ranks, rate):
    assert plan(Settings(model=model, batch_size=256), None, ranks).learning_rate == rate
    assert plan(Settings(model=model, batch_size=64, accumulate=4), None, ranks).learning_rate == rate
    assert plan(Settings(model=model, learning_rate=0.7), None, ranks).learning_rate == 0.7


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
    ("settings", "message"),
    [
        ({"num_classes": 32_769}, "--num_classes=32769: 32769 classes: must be at most 32768"),
        ({"num_batches": 2_000_000_000}, "--num_batches=2000000000: 2000000000 steps: must be at most"),
        ({"batch_size": 2**31 // 28**2 + 1}, "--batch_size=2739138: too many images of 28 x 28 pixels"),
    ],
)
def test_more_than_there_can_be_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        plan(Settings(model="lenet", **settings), None, ranks=1)


def test_dry_run_says_what_a_user_plans_by(capsys):
    settings = Settings(model="resnet50", batch_size=256, fp16=True, learning_rate=2.0)
    dry_run(settings, plan(settings, None, ranks=8))
    out = capsys.readouterr().out
    for line in ("--model=resnet50", "--learning_rate=2.0", "Batch size:  256 per device, 2048 total"):
        assert line in out.splitlines()
    assert "Parameters:  25,557,032" in out
    assert "GiB a device" in out


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


@pytest.mark.parametrize(("momentum", "size"), [("fp32", 12), ("bf16", 10)])
def test_dry_run_counts_momentum_in_its_dtype(capsys, momentum, size):
    settings = Settings(model="resnet152", batch_size=1, fp16=True, momentum_dtype=momentum)
    dry_run(settings, plan(settings, None, ranks=1))
    out = capsys.readouterr().out
    parameters = int(re.search(r"Parameters:  ([\d,]+)", out)[1].replace(",", ""))
    assert f"{size * parameters / 2**30:.2f} weights and optimizer" in out
