"""The model of a launch's time, on made-up numbers; and what the command says of calls that were measured."""

import json
import math
import os
import subprocess
import sys

import pytest

from benchmarks import predict
from benchmarks.predict import CLOCK, FITTED, GPUS, L2_RATE, Constants, Kernel, Known, fitted, limits, predicted
from kernels.configurations import SMS

H100 = GPUS["H100"]
CONSTANTS = Constants(stall=3, latency=1e-6, launch=2e-6)
KERNEL = Kernel(programs=10 * SMS, fit=4, warps=8, instructions=1000, bytes=1e9, flops=2e9)


def test_each_limit_of_a_launch():
    assert limits(KERNEL, 3e8, H100, CONSTANTS) == {
        "memory": 3e8 / H100.bandwidth,
        "L2": 1e9 / L2_RATE,
        "products": 2e9 / H100.rate,
        "issue": 3 * 1000 * (4 * 8 / 4 + 3) / CLOCK,  # ten programs an SM, four at a time, are three waves
        "latency": 3e-6,
    }


def test_few_programs_share_no_sm():
    of_few = limits(KERNEL._replace(programs=SMS // 2), 0, H100, CONSTANTS)
    assert of_few["issue"] == 1000 * (8 / 4 + 3) / CLOCK
    assert of_few["latency"] == 1e-6


def test_launches_follow_each_other_and_the_small_ones_find_their_bytes_in_the_cache():
    small, large = KERNEL._replace(bytes=1e6), KERNEL._replace(bytes=6e7)
    seconds, by = predicted([small, KERNEL, large], 3e9, H100, CONSTANTS)
    alone = [limits(*one, H100, CONSTANTS) for one in ((KERNEL, 3e9), (large, 6e7), (small, 0))]
    assert seconds == pytest.approx(3 * 2e-6 + sum(math.hypot(*one.values()) for one in alone))
    assert by == "memory"


def test_the_fit_finds_the_constants_that_made_the_times():
    truth = Constants(stall=2.0, latency=2e-6, launch=3e-6)
    kernels = [KERNEL._replace(programs=n * SMS, warps=w, instructions=i)
               for n, w, i in ((1, 1, 10), (3, 4, 900), (90, 2, 40), (7, 8, 5000), (400, 1, 1))]  # fmt: skip
    known = [Known("op", [kernel], 1e6, predicted([kernel], 1e6, H100, truth)[0] * 1e6) for kernel in kernels]
    assert [one.ratio(H100, truth) for one in known] == pytest.approx([1] * 5)
    found = fitted(known, H100)
    assert max(abs(one.ratio(H100, found) - 1) for one in known) < 0.03
    assert max(abs(one.ratio(H100, FITTED) - 1) for one in known) > 0.1


def test_a_call_of_a_step_is_compiled_and_compared_with_what_was_measured(tmp_path):
    file, name = tmp_path / "rows.json", "convolution 256 x 56 x 56 weight 64 x 1 x 1 stride 1 residual norm"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.predict", f"--only={name}", f"--json={file}"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["name"], row["calls"], row["H100 by"]) == (name, 1, "memory")
    (us,) = (one["ours"] for one in predict.results("H100")["call-by-call"]["rows"] if one["name"] == name)
    assert row["H100 measured"] == us
    assert row["H100 ratio"] == pytest.approx(row["H100"] / us)
    assert 0.8 < row["H100 ratio"] < 1.25
    assert row["H200 floor"] < row["H200"] < row["H100"]


def test_the_librarys_convolutions_take_what_was_measured_of_them():
    name = "convolution 64 x 56 x 56 weight 64 x 3 x 3"
    alone = [one for one in predict.measured("H100") if one.name.startswith(name)]
    rows = [one for one in predict.results("H100")["call-by-call"]["rows"] if one["name"].startswith(name)]
    assert [one.library_us for one in alone] == [one["cuDNN alone"] for one in rows]
    assert {round(one.flops / 1e8) for one in alone} == {round(2 * 256 * 56**2 * 64 * 64 * 9 / 1e8)}
