"""Contenders compute the same; the report has a row for each."""

import sys

import pytest
import torch

from benchmarks import layers
from benchmarks.layers import OURS, Layer
from kernels.operators import operators

CPU = torch.device("cpu")
ALL = list(layers.all_layers())


def small(inputs, size=6):
    """Returns the inputs' upper left corners."""
    return tuple(
        x.detach()[:, :, :size, :size].clone(memory_format=torch.channels_last).requires_grad_()
        if x.dim() == 4 and x.is_floating_point()
        else x
        for x in inputs
    )


def test_the_batch_norms_are_those_of_resnet50():
    found = layers.batch_norms()
    assert found["bn1"] == (64, 112, False, True)
    assert found["layer1.0.bn3"] == (256, 56, True, True)
    assert found["layer1.0.downsample.1"] == (256, 56, False, False)
    assert found["layer4.0.bn3"] == (2048, 7, True, True)
    assert len(found) == 16


def test_every_differentiable_op_has_a_benchmark():
    ours = [op for op in operators.values() if op.__module__.startswith("kernels.")]  # not those of other tests
    differentiable = {op.name.removeprefix("nvcnn::") for op in ours if op.function is not None}
    assert {layer.name.split()[0] for layer in ALL} == {
        *differentiable,
        "prepare_input",
        "convolution",
        "gram_matrix",
        "bottleneck",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="batch 256: run as a benchmark there")
@pytest.mark.parametrize("layer", ALL, ids=[layer.name for layer in ALL])
def test_contenders_compute_the_same(layer):
    inputs = small(layer.inputs(CPU, torch.float32))
    made = {name: make(CPU) for name, make in layer.contenders.items()}
    assert len(made) == 2
    for backward in layer.phases:
        results = []
        for run in made.values():
            torch.manual_seed(1)  # the direction of the gradient
            results.append(run(*inputs, backward=backward))
        for ours, theirs in zip(*results, strict=True):
            difference = (ours.double() - theirs.double()).norm()
            assert difference <= 2e-5 * theirs.double().norm(), (layer.name, backward)


def test_a_layer_has_a_row_for_each_peer_measured_or_with_its_reason(device):
    def absent(device):
        raise ModuleNotFoundError("No module named 'absent'")

    def run(x, backward):
        return (x * 2,)

    contenders = {OURS: lambda device: run, "twice": lambda device: run, "absent": absent}
    layer = Layer("double 4", lambda device, dtype: (torch.ones(4, device=device),), contenders, phases=(False,))
    rows = layers.compare(layer, False, copy=1 << 20, n=64, rounds=3)
    measured, missing = rows[:2]
    assert measured["name"] == "double 4, forward / twice"
    assert measured["ratio"] > 0
    assert missing["note"] == "ModuleNotFoundError: No module named 'absent'"
    assert len(rows) == (3 if device.type == "cuda" else 2)


def test_the_floor_is_the_bytes_of_our_ops():
    layer = next(layer for layer in ALL if layer.name.startswith("max_pool"))
    batch = layers.device_and_batch()[2]
    x, y = 64 * 112 * 112, 64 * 56 * 56
    assert layers.bytes_and_flops(layer, torch.float16, False) == (batch * (2 * x + 2 * y + y), 0)
    assert layers.bytes_and_flops(layer, torch.float16, True) == (2 * batch * (2 * x + 2 * y + y), 0)


def test_a_name_that_is_no_layers_is_bad_usage(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["layers", "no_such_layer"])
    with pytest.raises(SystemExit) as stopped:
        layers.main()
    assert stopped.value.code == 2
    assert "no_such_layer" in capsys.readouterr().err


def test_the_floor_of_a_convolution_has_its_flops():
    batch, dtype = layers.device_and_batch()[2], torch.float16
    found = {layer.work: layer for layer in ALL if layer.name.startswith("convolution layer2.1.conv2 128 x ")}
    pixels = batch * int(next(iter(found.values())).name.split()[4]) ** 2
    activation, weight = 2 * pixels * 128, 2 * 128 * 128 * 9
    for work in ("forward", "data gradient", "weight gradient"):
        flops = 2 * pixels * 128 * 128 * 9
        assert layers.bytes_and_flops(found[work], dtype, False) == (2 * activation + weight, flops), work
    assert found["data gradient"].title(False).endswith(", data gradient")


def test_a_block_of_resnet50_moves_less_fused():
    fused, apart = (
        Layer("block", layer.inputs, {OURS: layer.contenders[name]})
        for layer in ALL
        if layer.name.startswith("bottleneck layer2.1")
        for name in (OURS, "torchvision")
    )
    moved = {name: layers.bytes_and_flops(layer, torch.float32, True) for name, layer in (("f", fused), ("a", apart))}
    assert moved["f"][0] < 0.7 * moved["a"][0]
    assert moved["f"][1] == moved["a"][1]
