import copy

import pytest
import torch

from benchmarks import ops


def test_what_a_step_must_move():
    """Matrices take 26 bytes per parameter with fp16 gradients and weights; vectors are fp32 throughout."""
    larc = ops.optimizer("lenet", torch.device("cpu"), torch.float16)
    norm = 32 + 64 + 512 + 1000
    matrices = 32 * 3 * 25 + 64 * 32 * 25 + 512 * 64 * 49 + 1000 * 512
    assert sum(ops.bytes_of(larc.arena).values()) == 26 * matrices + 28 * norm


def test_the_launches_apart_are_the_step(device):
    apart = ops.optimizer("lenet", device, torch.float32)
    whole = copy.deepcopy(apart)
    before = apart.arena.weight.clone()
    for launch in ops.launches(apart).values():
        launch()
    whole.step()
    assert torch.equal(apart.arena.weight, whole.arena.weight)
    assert torch.equal(apart.arena.momentum, whole.arena.momentum)
    assert not torch.equal(apart.arena.weight, before)
    assert apart.counters.tolist() == [1, 1, 1]


def test_ops_have_a_share_of_the_floor(device):
    rows = ops.measure_ops("lenet", device, torch.float32, size=1 << 20, rounds=3)
    names = [row["name"] for row in rows]
    assert [name.split(": ")[1].split(" / ")[0] for name in names] == [
        *("gradient_statistics", "larc_update", "trust_ratio", "gradient_statistics")
    ]
    assert all(row["ours"] > 0 for row in rows)
    assert all(row["note"].endswith("GB/s") for row in rows if row["name"].endswith("/ floor"))


def test_a_skipped_step_is_no_measurement(device, monkeypatch):
    def overflowing(*arguments):
        larc = make(*arguments)
        larc.arena.matrix_gradient[7] = float("inf")
        return larc

    make = ops.optimizer
    monkeypatch.setattr(ops, "optimizer", overflowing)
    with pytest.raises(RuntimeError, match="skipped as an overflow"):
        ops.measure_ops("lenet", device, torch.float32, size=1 << 20, rounds=1)


def test_ceilings(device):
    rows = ops.ceilings(device, [torch.float32], size=1 << 20, n=64, rounds=3)
    assert [(row["name"], row["unit"]) for row in rows] == [
        ("ceiling: copy of 1 MiB", "GB/s"),
        ("ceiling: 64 x 64 matmul, float32", "TFLOP/s"),
    ]
    assert all(row["peer"] > 0 for row in rows)


def test_a_peer_that_fails_is_named(device):
    def absent():
        raise ModuleNotFoundError("No module named 'timm'")

    def fine():
        return lambda: None

    rows = ops.measure_steps({"ours": fine}, {"timm Lars": absent, "SGD": fine}, device, rounds=2, repeat=1)
    assert [row["name"] for row in rows] == ["optimizer step: ours / SGD", "optimizer step: ours / timm Lars"]
    assert rows[1]["note"] == "ModuleNotFoundError: No module named 'timm'"
