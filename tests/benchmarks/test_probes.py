"""The probes' kernels are right in the interpreter and compile for their GPU; probes are run and judged."""

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from math import inf, nan
from pathlib import Path

import pytest
import torch

from benchmarks import probes, timing
from benchmarks.probes import NAMES, load
from benchmarks.probes import run as runner


def module(name):
    return import_module(f"benchmarks.probes.{name}")


@pytest.fixture
def hopper(device):
    """Returns the device, if it has TMA, as the interpreter does."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA is of Hopper and later")
    return device


@pytest.fixture
def poisoned(monkeypatch):
    """Fills fresh memory with NaN, so that a value that a kernel leaves out shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def integers(*shape, device, std=1.0):
    """Returns -1, 0 and 1, with so many zeros that the squares of a convolution's results are exact halves."""
    return (torch.randint(-1, 2, shape, device=device) * torch.randint(0, 4, shape, device=device).eq(0)).half()


def integer_norm(channels, device):
    return torch.stack((torch.ones(channels, device=device).half(), integers(channels, device=device)))


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_right(name, hopper, poisoned, monkeypatch):
    """On the CPU that of both gradients is its reference."""
    torch.manual_seed(0)
    if hopper.type == "cpu":
        monkeypatch.setattr(module("joint_gradient"), "SMALL", (2, 5, 7))
    probe = load(name)
    found = probe.check(hopper)
    assert found
    assert all(value <= probe.tolerance for value in found.values()), found


def test_the_forward_kernel_is_exact_on_small_integers(hopper, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(module("resident_forward"), "normal", integers)
    monkeypatch.setattr(module("resident_forward"), "random_norm", integer_norm)
    found = load("resident_forward").check(hopper)
    assert set(found.values()) == {0.0}, found


def test_squares_of_deviations_stay_finite_and_a_nan_shows(hopper):
    x, weight = torch.ones(512, 64, device=hopper).half(), torch.ones(256, 64, device=hopper).half()
    weight[1::2] = -1
    x_norm, y_norm = (
        torch.stack((torch.full((n,), value, device=hopper), torch.zeros(n, device=hopper))).half()
        for n, value in ((64, 1.0), (256, 1000.0))
    )
    sums = module("resident_forward").launch(x, weight, x_norm, y_norm, 128)[1].sum(1)
    sign = torch.ones(256, device=hopper)
    sign[1::2] = -1
    assert torch.equal(sums, torch.stack((512 * 240 * sign, torch.full_like(sign, 512 * 240**2))))
    x[100, 0] = nan
    assert module("resident_forward").launch(x, weight, x_norm, y_norm, 128)[1].sum(1).isnan().all()


SCRIPT = """
import json
from benchmarks.codegen import compile_launch
from benchmarks.probes import NAMES, launches, load
found = {name: launches(load(name)) for name in NAMES}
rows = []
for name, all_of_them in found.items():
    for launch in all_of_them:
        row = {"probe": name, "module": launch.module, "kernel": launch.kernel}
        if launch.module.startswith("benchmarks.probes."):
            row |= compile_launch(launch)
        rows.append(row)
print(json.dumps(rows))
"""


@pytest.fixture(scope="module")
def rows():
    """Returns all launches of all probes, their own kernels compiled, from a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout)


def test_all_launches_are_found_before_they_run(rows):
    found = {(row["probe"], row["kernel"]) for row in rows}
    own = {
        "joint_gradient": ["kernel", "sum_kernel"],
        "resident_forward": ["resident_forward"],
    }
    assert {(probe, kernel) for probe, kernels in own.items() for kernel in kernels} <= found
    assert {row["probe"] for row in rows if row["module"].startswith("kernels.")} == set(NAMES)


def test_kernels_use_the_tensor_cores_and_nothing_spills_or_waits(rows):
    for row in rows:
        if not row["module"].startswith("benchmarks.probes."):
            continue
        assert (row["spills"], row["matrix"], row["breach"]) == (0, "wgmma", ""), row
    assert any(row["module"] == "kernels.convolution_gradients" for row in rows)  # which `benchmarks.codegen` compiles
    assert {row["programs"] for row in rows if row["kernel"] == "resident_forward"} == {1, 2}


JOINT = {"one kernel, 256 to 64 channels": 500} | dict.fromkeys(
    ("two kernels, 64 to 256 channels", "two kernels, 256 to 64 channels"), 700
)


@pytest.mark.parametrize(
    ("name", "us", "factor", "expected"),
    [
        ("joint_gradient", JOINT | {"one kernel, 64 to 256 channels": 350}, 1.4, "one kernel is faster: 64 to 256"),
        (
            "joint_gradient",
            JOINT | {"one kernel, 64 to 256 channels": 700},
            1.4,
            "two kernels are faster for 64 to 256",
        ),
        ("resident_forward", {"128 x 128": 300, "64 x 128": 230}, 1.0, "Triton suffices"),
        ("resident_forward", {"128 x 128": 231, "64 x 128": 231}, 1.0, "write it in Gluon"),
    ],
)
def test_verdicts(name, us, factor, expected):
    assert expected in load(name).verdict(us, factor)


@pytest.mark.parametrize("value", [3e-3, nan, inf])
def test_a_wrong_result_is_said_before_its_time(value):
    us = {"128 x 128": 200, "64 x 128": 210}
    row = runner.judged(load("resident_forward"), {"sum": 0.0, "y": value}, us, dict.fromkeys(us, 171), 1.0)
    assert not row["good"]
    assert row["verdict"].startswith("WRONG (y); if mended: Triton suffices")
    assert runner.line(row).startswith("resident_forward: error ")


def test_a_probe_is_measured_and_judged(hopper, monkeypatch):
    alternate = timing.alternate
    monkeypatch.setattr(timing, "alternate", lambda steps, device, **_: alternate(steps, device, rounds=1, warm_up=0))
    monkeypatch.setattr(module("resident_forward"), "IMAGES", 2)
    monkeypatch.setattr(runner, "COPY", 1 << 20)
    monkeypatch.setattr(runner, "MATMUL", 64)
    row = runner.measure(load("resident_forward"), hopper)
    assert list(row["us"]) == list(row["floor"]) == ["128 x 128", "64 x 128", "present", "cuDNN, convolution alone"]
    assert all(value > 0 for value in [*row["us"].values(), *row["floor"].values()])
    assert row["good"]
    assert "\n" not in runner.line(row)


@pytest.fixture
def target(tmp_path, monkeypatch):
    """Writes what a worker process runs: `serve(names, answers)` with this body."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body: str):
        (tmp_path / "stand_in_worker.py").write_text(
            "import os, time\n\n\ndef serve(names, answers):\n    for name in names:\n"
            + "".join(f"        {line}\n" for line in body.splitlines())
        )
        sys.modules.pop("stand_in_worker", None)
        return import_module("stand_in_worker").serve

    return write


def test_a_probe_that_kills_its_process_does_not_stop_the_others(target):
    serve = target("if name == 'joint_gradient':\n    os._exit(1)\nanswers.send(({'name': name, 'good': True}, True))")
    rows = []
    names = ["resident_forward", "joint_gradient", "resident_forward"]
    runner.run(names, 60, rows.append, serve)
    assert [(row["name"], row["good"]) for row in rows] == list(zip(names, (True, False, True), strict=True))
    assert rows[1]["verdict"] == "FAILED: its process died"


def test_the_command_starts_a_process_that_runs_probes():
    """A process that is spawned by a package's __main__ cannot import what it is to call from there."""
    script = """
import runpy, sys, torch
torch.cuda.is_available, torch.cuda.get_device_capability = lambda: True, lambda: (9, 0)
sys.argv = ["probes", "resident_forward"]
runpy.run_module("benchmarks.probes", run_name="__main__", alter_sys=True)
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    root = Path(probes.__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", script], env=environment, cwd=root, capture_output=True, text=True)
    assert "resident_forward: FAILED: " in ended.stdout, ended.stderr
    assert "its process died" not in ended.stdout


def test_a_probe_that_ruins_the_device_is_followed_by_a_new_process(target):
    serve = target(
        "alive = name != 'joint_gradient'\n"
        "answers.send(({'name': name, 'pid': os.getpid()}, alive))\n"
        "if not alive:\n    return"
    )
    rows = []
    names = [*NAMES, NAMES[0]]
    runner.run(names, 60, rows.append, serve)
    assert [row["name"] for row in rows] == names
    assert rows[0]["pid"] != rows[1]["pid"] == rows[2]["pid"]


def test_a_probe_that_hangs_is_ended_and_what_is_not_reached_is_said(target):
    serve = target("time.sleep(60)")
    rows = []
    start = time.monotonic()
    runner.run(["joint_gradient", "resident_forward"], 2, rows.append, serve)
    assert time.monotonic() - start < 30
    assert [row["name"] for row in rows] == ["joint_gradient", "resident_forward"]
    assert "no result in 2 s" in rows[0]["verdict"]
    assert rows[1]["verdict"] == "FAILED: not reached in --seconds=2"


def test_without_the_gpu_they_are_for_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert runner.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "H100 or H200" in line


def test_a_dry_run_lists_all_of_them_in_order(capsys):
    assert runner.main(["--dry_run"]) == 0
    _, *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(NAMES)
    assert total.startswith(f"{sum(load(name).seconds for name in NAMES):g} s expected")


def test_rows_are_written_as_they_come(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("benchmarks.report.versions", dict)
    file = tmp_path / "rows.json"

    def run(names, seconds, add):
        for name in names:
            add(runner.failed(name, "a reason"))
            assert [row["name"] for row in json.loads(file.read_text())["rows"]][-1] == name

    monkeypatch.setattr(runner, "run", run)
    assert runner.main(["resident_forward", "joint_gradient", f"--json={file}"]) == 1
    assert capsys.readouterr().out.splitlines() == [f"{name}: FAILED: a reason" for name in NAMES[:2]]


def test_every_probe_has_a_file_of_its_name():
    files = {file.stem for file in Path(probes.__file__).parent.glob("*.py")}
    assert files == set(NAMES) | {"__init__", "__main__", "halves", "present", "run"}
    assert [load(name).name for name in NAMES] == list(NAMES)


def test_tiles_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="tiles of 128 must divide 130"):
        probes.divides(128, 130)
