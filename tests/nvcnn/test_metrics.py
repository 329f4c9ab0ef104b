"""The table and the throughput line are printed; other programs can read the files."""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch

from nvcnn import metrics, plot
from nvcnn.metrics import Metrics, Throughput, Timer


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    return now


def test_throughput_leaves_the_burn_in_out(clock):
    throughput = Throughput(images_per_step=64)
    clock[0] += 100  # a slow start
    assert throughput.lap(20) == pytest.approx(64 * 20 / 100)
    assert throughput.summary() is None
    for step, seconds in ((30, 1.0), (40, 2.0), (60, 2.0)):
        clock[0] += seconds
        throughput.lap(step)
    mean, error, jitter = throughput.summary()
    assert mean == pytest.approx((640 + 320 + 2 * 640) / 4)  # by steps
    assert error == pytest.approx(statistics.stdev((640, 320, 640)) / math.sqrt(3))
    assert jitter == 0


@pytest.mark.parametrize(
    ("first", "laps", "line"),
    [
        (0, [], "not known, no table line was reached"),
        (0, [1], "10.0 (of 1 step(s), with the start)"),
        (0, [1, 3], "20.0 (of the last 2 step(s))"),
        (4, [10, 24], "140.0 (of the last 14 step(s))"),
        (0, [1, 20, 21], "10.0 (of the last 1 step(s))"),
        (0, [1, 10, 20, 24], "40.0 (of the last 4 step(s))"),
        (0, [*range(1, 24), 25], "14.0 +/- 2.5 (jitter = 0.0)"),
    ],
)
def test_the_closing_line_of_a_short_run(clock, first, laps, line):
    throughput = Throughput(10, first)
    for step in laps:
        clock[0] += 1
        throughput.lap(step)
    assert throughput.in_words() == f"Images/sec: {line}"
    summary = throughput.summary()
    assert summary is None or not any(value is not None and math.isnan(value) for value in summary)


def test_what_the_rest_takes_is_known_after_the_start(clock):
    throughput = Throughput(images_per_step=64, first_step=5)
    found = []
    for step, seconds in ((6, 100.0), (7, 2.0), (9, 8.0)):
        clock[0] += seconds
        throughput.lap(step)
        found.append(throughput.known_to_take(10))
    assert found == pytest.approx([0, 20, 40])


def test_time_for_a_checkpoint_is_left_out(clock):
    throughput = Throughput(images_per_step=10)
    clock[0] += 1
    with throughput.left_out():
        clock[0] += 4
    assert throughput.lap(1) == pytest.approx(10)


def test_a_timer_starts_anew_when_it_is_over(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    timer, found = Timer(10), []
    for now[0] in (5, 11, 20, 22):
        found.append(timer.over())
    assert found == [False, True, False, True]


VALUES = {"loss": 1.0, "learning_rate": 0.1, "loss_scale": 1.0, "images_per_second": 1000.0, "skipped": 0}


def fill(log_dir, steps=3):
    shown = Metrics(str(log_dir), steps=steps, first_step=0, rank=0)
    shown.table_head()
    for step in range(1, steps + 1):
        shown.train(step, 1, **VALUES | {"loss": 2.5 / step if step != 2 else math.nan})
    shown.summarize(steps, {"loss": 1.0})
    shown.end(steps, Throughput(1))
    shown.close()


def test_table_and_files(tmp_path, capsys):
    fill(tmp_path)
    out = capsys.readouterr().out.splitlines()
    assert out[0].split() == ["Step", "Epoch", "Img/sec", "Loss", "LR"]
    assert out[1] == "     1     1  1000.0   2.500 0.10000"
    assert "nan" in out[2]
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["train"] * 3 + ["end"]
    assert events[0] | {"time": 0} == {"event": "train", "time": 0, "step": 1, "epoch": 1} | VALUES | {"loss": 2.5}
    assert events[1]["loss"] is None
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_event_files(tmp_path, monkeypatch):
    """A point at each line, at most one a second, and none of steps that a resumed run goes back over."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def shown(tag):
        found = accumulator.EventAccumulator(str(tmp_path)).Reload()
        return {event.step: event.value for event in found.Scalars(tag)}, found

    fill(tmp_path)
    assert shown("train/loss")[0] == {1: 2.5, 3: pytest.approx(2.5 / 3)}
    monkeypatch.setattr(metrics, "POINTS", -1.0)
    resumed = Metrics(str(tmp_path), steps=9, first_step=2, rank=0)
    resumed.input(torch.full((5, 8, 8, 3), 7, dtype=torch.uint8), ["cat", "dog", "$e$l", "", 99 * "x"])
    for step in (4, 5):
        resumed.train(step, 1, **VALUES)
    resumed.evaluation(5, 1, "Top-1: 50 %", top1=50.0, top5=90.0, images=10)
    resumed.close()
    losses, found = shown("train/loss")
    assert losses == {1: 2.5, 4: 1, 5: 1}
    assert {tag for tag in found.Tags()["scalars"] if tag.startswith("eval")} == {"eval/top1", "eval/top5"}
    (image,) = found.Images("input")
    assert image.encoded_image_string == (tmp_path / "input.png").read_bytes()
    (event,) = (event for event in plot.read(tmp_path) if event["event"] == "eval")
    assert [event[key] for key in ("step", "epoch", "top1", "top5", "images")] == [5, 1, 50.0, 90.0, 10]


@pytest.mark.parametrize("tail", [b'{"event": "train", "st', bytes(5000), b"\xff\n5\n{}"])
def test_appending_starts_a_line_and_reading_passes_over_bad_ones(tmp_path, capsys, tail):
    fill(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])  # its last event is whole
    fill(tmp_path)
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 8
    with path.open("ab") as file:
        file.write(tail)
    before = path.read_bytes()
    metrics.add_evaluation(tmp_path, {"step": 3, "top1": 50.0, "top5": 90.0})
    fill(tmp_path)
    assert [e["event"] for e in plot.read(tmp_path)] == (["train"] * 3 + ["end"]) * 2 + ["eval"] + [
        *["train"] * 3,
        "end",
    ]
    assert path.read_bytes().startswith(before + b"\n{")
    assert capsys.readouterr().err == ""


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, capsys, monkeypatch):
    class Board:
        def add_scalars(self, *_):
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics, "tensorboard_writer", lambda *_: Board())
    monkeypatch.setattr(metrics, "open_to_append", lambda _, full=metrics.open_to_append: full(Path("/dev/full")))
    (tmp_path / "metrics.jsonl").mkdir()
    fill(tmp_path)
    without = [f"{tmp_path}/{name} cannot be written" for name in ("metrics.jsonl", "events.out.tfevents", "curve.png")]
    reasons = ["No space left on device", "No space left on device", "Is a directory"]
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{line} ({why}); going on without" for line, why in zip(without, reasons, strict=True)]
    monkeypatch.undo()
    fill(tmp_path)
    metrics.add_evaluation(tmp_path, {"step": 3, "top1": 50.0, "top5": 90.0})
    assert capsys.readouterr().err.count("Is a directory") == 4


def test_a_terminal_without_tqdm(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = Metrics("", steps=3, first_step=0, rank=0)
    shown.step()
    shown.table_head()
    shown.close()
    printed = capsys.readouterr()
    assert "Step Epoch" in printed.out
    assert "tqdm is not installed" in printed.err


def test_a_nested_value_that_is_not_finite_is_null_too(tmp_path):
    shown = Metrics(str(tmp_path), steps=1, first_step=0, rank=0)
    shown.write("tensors", step=1, trust_ratio={"w": math.nan, "b": 1.0}, gradient_norm={"w": math.inf, "b": -math.inf})
    shown.close()
    (event,) = plot.read(tmp_path)
    assert event["trust_ratio"] == {"w": None, "b": 1.0}
    assert event["gradient_norm"] == {"w": None, "b": None}


def test_other_ranks_are_silent(tmp_path, capsys):
    quiet = Metrics(str(tmp_path), steps=3, first_step=0, rank=1)
    quiet.table_head()
    quiet.train(1, 1, **VALUES)
    quiet.evaluation(1, 1, top1=50.0, top5=90.0, images=10)
    quiet.input(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), ["cat"])
    quiet.end(1, Throughput(1))
    quiet.close()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
