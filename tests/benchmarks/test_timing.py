import pytest
import torch

from benchmarks import timing

CPU = torch.device("cpu")


def test_contenders_take_turns():
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = timing.alternate(steps, CPU, rounds=3, repeat=2, warm_up=1)
    assert "".join(calls) == "ab" + "aabb" * 3
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}


def test_the_time_is_of_one_step(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def step():
        clock[0] += 0.5

    assert timing.alternate({"a": step}, CPU, rounds=2, repeat=4) == {"a": [500.0, 500.0]}


def test_the_device_can_be_timed(device):
    x = torch.randn(64, 64, device=device)
    assert timing.milliseconds(lambda: x @ x, device) > 0


@pytest.mark.parametrize(
    ("unit", "ours", "peer"), [("ms", 2.0, 6.0), ("us", 2000.0, 6000.0), ("images/s", 4000.0, 1333.0)]
)
def test_a_ratio_above_1_is_ours_being_faster(unit, ours, peer):
    row = timing.row("x", unit, [1.0, 2.0, 4.0], [3.0, 6.0, 12.0], images=8)
    assert (row["ours"], row["peer"], row["ratio"], row["spread"]) == (ours, peer, 3.0, "3.0 - 3.0")


def test_a_ratio_is_of_one_round():
    # The machine slows down by 10 in the second half: the ratio stays that of each round.
    row = timing.row("x", "ms", [1.0, 1.0, 10.0, 10.0], [2.0, 2.0, 20.0, 20.0])
    assert row["ratio"] == 2


def test_what_was_not_measured_has_the_same_columns_and_its_reason():
    row = timing.missing("x", "ms", ModuleNotFoundError("No module named 'timm'\nand more"))
    assert list(row) == list(timing.row("x", "ms", [1.0], [1.0]))
    assert row["note"] == "ModuleNotFoundError: No module named 'timm'"
    assert timing.shown([row])[0]["ratio"] == "-"


def test_a_captured_step_does_what_the_step_does(device):
    x = torch.zeros(1, device=device)
    step = timing.captured(lambda: x.add_(1), device)
    before = x.item()
    step()
    step()
    assert x.item() == before + 2
