"""What is drawn is of the runs that led to the present state; what cannot be drawn has its own line."""

import json
import math
import sys

import pytest

from nvcnn import plot
from nvcnn.plot import compare, draw_curve, history, main
from nvcnn.program import InputError


def write(log_dir, *events, **start):
    """Writes events (kind, step, value): the value is a loss or a top-1."""
    log_dir.mkdir(parents=True, exist_ok=True)
    with (log_dir / "metrics.jsonl").open("a") as file:
        for event, step, *value in events:
            names = {"train": ("loss",), "eval": ("top1", "top5"), "start": ()}[event]
            values = start if event == "start" else dict.fromkeys(names, *value)
            file.write(json.dumps({"event": event, "step": step} | values) + "\n")


BEGUN = (("start", 0), ("train", 1, 9.0), ("train", 2, 8.0), ("eval", 2, 20.0), ("train", 3, 7.0), ("eval", 3, 30.0))


@pytest.mark.parametrize(
    ("later", "losses", "evaluated"),
    [
        ((("start", 2), ("train", 4, 6.0)), {1: 9, 2: 8, 4: 6}, {2: 20}),  # lines of steps 3 are of a dead run
        ((("start", 2), ("train", 3, 6.0), ("eval", 3, 40.0)), {1: 9, 2: 8, 3: 6}, {2: 20, 3: 40}),
        ((("start", 2), ("start", 1), ("train", 2, 5.0)), {1: 9, 2: 5}, {}),  # went back over a damaged checkpoint
        ((("start", 0), ("train", 1, 1.0)), {1: 1}, {}),  # it had come to no checkpoint
        ((("start", 3), ("eval", 3, 50.0)), {1: 9, 2: 8, 3: 7}, {2: 20, 3: 50}),  # the later line holds
    ],
)
def test_points_of_a_dead_run_are_left_out(tmp_path, later, losses, evaluated):
    write(tmp_path, *BEGUN, *later)
    run = history(tmp_path)
    assert {event["step"]: event["loss"] for event in run.train} == losses
    assert {event["step"]: event["top1"] for event in run.evaluations} == evaluated


def test_evaluations_of_averages_come_before_others(tmp_path):
    write(tmp_path, *BEGUN)
    evaluations = ((2, 10, False), (2, 50, True), (2, 20, False), (3, 30, False))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for step, top1, ema in evaluations:
            file.write(json.dumps({"event": "eval", "step": step, "top1": top1, "ema": ema}) + "\n")
    assert [(event["step"], event["top1"]) for event in history(tmp_path).evaluations] == [(2, 50), (3, 30)]


@pytest.fixture
def plotted(monkeypatch):
    """Returns the points of each line that is drawn."""
    axes = pytest.importorskip("matplotlib.axes").Axes
    lines = []
    whole = axes.plot

    def record(self, x, y, **look):
        lines.append((x, y))
        return whole(self, x, y, **look)

    monkeypatch.setattr(axes, "plot", record)
    return lines


def test_a_curve_is_drawn_over_epochs_once_there_are_two(tmp_path, plotted):
    write(tmp_path, *BEGUN, ("train", 4, None), steps_per_epoch=4)
    draw_curve(tmp_path)
    assert [x for x, _ in plotted] == [(1, 2, 3, 4), (2, 3)]
    assert plotted[1][1] == (20, 30)
    assert math.isnan(plotted[0][1][-1])
    write(tmp_path, ("train", 8, 1.0))
    draw_curve(tmp_path)
    assert [x for x, _ in plotted[2:]] == [(0.25, 0.5, 0.75, 1, 2), (0.5, 0.75)]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_compared_by_name(tmp_path, monkeypatch, capsys):
    for name in ("one", "two", "old/one"):
        write(tmp_path / name, *BEGUN, steps_per_epoch=2)
    drawn, named = plot.drawn, []
    monkeypatch.setattr(plot, "drawn", lambda runs, *rest, **more: named.append([*runs]) or drawn(runs, *rest, **more))
    monkeypatch.chdir(tmp_path)
    assert main(["two", "one/metrics.jsonl", "--out=both.png"]) == 0
    write(tmp_path / "begun", ("start", 0))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["one", "~/old/one", "begun", "one", "two", "--out=~/runs.png"]) == 0
    assert named == [["two", "one"], ["one", f"{tmp_path}/old/one", "two"]]
    said = capsys.readouterr()
    assert said.out == f"Written to both.png\nWritten to {tmp_path}/runs.png\n"
    assert said.err == "begun: holds no table line of a training: it is left out\n"
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("both.png", "runs.png"))


def test_what_cannot_be_compared_is_said_and_nothing_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "run", *BEGUN)
    write(tmp_path / "begun", ("start", 0))
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    for arguments, message in (
        (["run", "nowhere"], "nowhere: no such run"),
        (["run", "empty"], "empty: no metrics.jsonl there"),
        (["begun", "begun"], "none of the runs holds a table line"),
        (["run", "--out=picture.bmp"], "--out=picture.bmp: must end in .png"),
        (["run", "--out=no/picture.png"], "--out=no/picture.png: cannot be written"),
        ([], "RUN"),
    ):
        with pytest.raises(InputError, match=message):
            main(arguments)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        compare([tmp_path / "run"], tmp_path / "runs.png")
    assert sorted(tmp_path.iterdir()) == before
