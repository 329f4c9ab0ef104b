"""A soak tells what grows from what does not, and counts what the ranks have, not others."""

import math
import os
import random
import subprocess

import psutil
import pytest

from benchmarks import soak
from nvcnn.data.dataset import find_dataset
from tests.samples import write_split

TIMES = [2.0 * n for n in range(400)]


def noisy(level, growth, noise):
    """Returns values that grow by so much over all times; each epoch of 7 s has a second of other ones."""
    draw = random.Random(1)
    return [level + growth * t / TIMES[-1] + noise * (draw.random() + (t % 7 < 1)) for t in TIMES]


@pytest.mark.parametrize(
    ("values", "unit", "flat"),
    [
        (noisy(800, 0, 5), "MB", True),
        (noisy(800, 20, 1), "MB", True),  # less than 3 %
        (noisy(800, 30, 5), "MB", False),
        (noisy(800, 30, 500), "MB", True),  # nobody can tell
        (noisy(800, -300, 5), "MB", True),
        (noisy(40, 0, 4), "", True),
        (noisy(40, 2, 4), "", False),
        ([30.0] * 400, "", True),
        (noisy(1000, -100, 50), "images/s", False),
        (noisy(1000, -30, 10), "images/s", True),
        (noisy(1000, 100, 50), "images/s", True),
        (noisy(800, 0, 5)[:380] + noisy(1600, 0, 5)[380:], "MB", False),  # a late jump is no line
        (noisy(40, 0, 4)[:380] + noisy(60, 0, 4)[380:], "", False),
        (noisy(1000, 0, 50)[:380] + noisy(500, 0, 50)[380:], "images/s", False),
        (noisy(1000, 0, 50)[:380] + noisy(1500, 0, 50)[380:], "images/s", True),
    ],
)
def test_what_is_flat(values, unit, flat):
    row = soak.judged("name", unit, TIMES, values)
    assert row["flat"] is flat
    assert not math.isnan(row["+/-"])


def test_a_slope_is_that_of_an_hour():
    row = soak.judged("name", "MB", TIMES, [100 + t / 36 for t in TIMES])
    assert row["an hour"] == pytest.approx(100)
    assert row["added"] == pytest.approx(TIMES[-1] / 36, rel=1e-3)


def test_too_few_values_are_no_slope():
    with pytest.raises(RuntimeError, match="3 values are too few for a slope"):
        soak.judged("name", "MB", TIMES[:3], [1.0] * 3)


def test_warm_up_is_left_out():
    found = {"rank 0: threads, ": [TIMES, [50.0] * 70 + [9.0] * 330], "speed, images/s": [TIMES, [7.0] * 400]}
    found[soak.CORE] = [TIMES[:-50], [1.0] * 350]  # the last table lines came long after the last look
    rows = soak.rows_of("torch", found)
    assert [(row["name"], row["mean"], row["flat"]) for row in rows] == [
        ("torch, rank 0: threads", 9.0, True),
        ("torch, speed", 7.0, True),
    ]


@pytest.mark.parametrize(("slower", "flat"), [(2.0, True), (1.0, False)])
def test_a_core_that_becomes_slow_is_no_training_that_does(slower, flat):
    """The speed is half from the middle on; so is the core's, or not."""
    half = len(TIMES) // 2
    speed = noisy(1000, 0, 50)[:half] + noisy(500, 0, 25)[half:]
    loops = noisy(30, 0, 5)[:half] + [slower * one for one in noisy(30, 0, 5)[half:]]
    (row,) = soak.rows_of("torch", {soak.SPEED: [TIMES, speed], soak.CORE: [TIMES, loops]})
    assert (row["name"], row["flat"]) == ("torch, speed", flat)
    assert soak.core() > 0


def test_ranks_are_found_and_what_they_have(tmp_path):
    started = []
    for rank in (1, 0):
        variables = {"SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        environment = os.environ | {f"OMPI_COMM_WORLD_{name}": value for name, value in variables.items()}
        command = ["sh", "-c", f"exec 7>{tmp_path}/{rank}; sleep 60 & echo; wait"]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
    try:
        assert [run.stdout.readline() for run in started] == [b"\n"] * 2
        found = soak.ranks_below(psutil.Process())
        assert [rank.pid for rank in found] == [run.pid for run in reversed(started)]
        one = soak.sample(found[0])
        assert (one["open files, "], one["threads, "], one["workers, "]) == (4, 1, 1)
        assert min(one["memory, MB"], one["memory of workers, MB"]) > 0
        assert soak.files(tmp_path) == 2
    finally:
        for run in started:
            for process in (*psutil.Process(run.pid).children(), run):
                process.kill()
            run.communicate()


@pytest.mark.parametrize(("ranks", "said"), [(1, "1 ranks are there, not 2"), (2, "training ended with exit code -9")])
def test_ranks_that_are_not_there_end_it_in_a_line(tmp_path, monkeypatch, ranks, said):
    """The launcher is a stand-in, which is killed as its ranks are looked at."""
    launcher = tmp_path / "mpiexec"
    launcher.write_text("#!/bin/sh\nexec sleep 60\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(soak.doctor, "find_program", lambda _: str(launcher))
    monkeypatch.setattr(soak.doctor, "mpi_flags", lambda *_: [])
    monkeypatch.setattr(soak, "excerpt", lambda *_: None)
    monkeypatch.setattr(soak.plot, "read", lambda _: [{"event": "train"}])
    monkeypatch.setattr(soak, "ranks_below", lambda process: [process] * ranks)

    def gone(process):
        process.kill()
        raise psutil.NoSuchProcess(process.pid)

    monkeypatch.setattr(soak, "sample", gone)
    with pytest.raises(RuntimeError, match=said):
        soak.soak("torch", "lenet", tmp_path, 60, tmp_path)


def test_an_epoch_is_the_first_images(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "IMAGES", {"train": 5, "validation": 3})
    for split in soak.IMAGES:
        write_split(tmp_path / "data", split, images=16, shards=2)
    (tmp_path / "data/dataset.json").write_text('{"num_classes": 16, "label_base": 1, "images": {"train": 16}}')
    soak.excerpt(tmp_path / "data", tmp_path / "few")
    for split, images in soak.IMAGES.items():
        few = find_dataset(tmp_path / "few", num_classes=None, label_base=None, split=split).source(split)
        assert [few.read(i)[1] for i in range(len(few))] == list(range(1, images + 1))


def test_a_picture_has_all_quantities(tmp_path):
    pytest.importorskip("matplotlib")
    series = [TIMES, [0.0] * 400]
    soak.draw(tmp_path / "soak.png", {"torch": {"rank 0: workers, ": series, "speed, images/s": series}})
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
