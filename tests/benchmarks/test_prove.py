"""What becomes of a proof that ends well, is wrong, crashes or hangs; and that it finds a kernel wrong."""

import json
import sys
import time

import pytest
import torch

from benchmarks import prove, tune
from kernels import configurations
from kernels.convolution_gradients import COMPUTED, OP, SOURCE, USES, passed, table_key
from nvcnn.kernel_choices import candidates
from nvcnn.meta import Place

CPU = torch.device("cpu")
KEYS = [table_key(torch.float16, *use) for use in USES]
OTHER = {"convolution": {"key": {"BLOCK_ROWS": 64}}}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Returns the table of the GPU that is here, which has a pass of both kernels, and one of an older source."""
    monkeypatch.setattr(configurations, "TABLES", tmp_path)
    monkeypatch.setattr(configurations, "table_name", lambda device: "some-gpu")
    configurations.read_table.cache_clear()
    file = tmp_path / "some-gpu.json"
    file.write_text(tune.text_of(OTHER | {OP: dict.fromkeys([*KEYS, KEYS[0].replace(SOURCE, "0" * 8)], COMPUTED)}))
    yield file
    configurations.read_table.cache_clear()


def of_code(*codes):
    """Returns `command` for processes that run these, one for each use."""
    by_use = dict(zip(USES, codes, strict=True))
    return lambda *arguments: [sys.executable, "-c", by_use[arguments[:-1]]]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; print('so far', flush=True); os.abort()", "its process ended with -6: so far"),
        ("import sys; print('dw of 1 x 5 x 19 is off by 2.0e-03 of its norm'); sys.exit(1)", "dw of 1 x 5 x 19 is off"),
        ("raise RuntimeError('CUDA error: misaligned address')", "RuntimeError: CUDA error: misaligned address"),
    ],
)
def test_what_crashes_or_disagrees_has_no_pass_and_loses_that_it_had(table, capsys, code, said):
    tune.record_passes(table, "fp16", command=of_code(code, "print('right')"), seconds=30)
    assert json.loads(table.read_text()) == OTHER | {OP: {KEYS[1]: COMPUTED}}
    bad, good = capsys.readouterr().out.splitlines()
    assert bad.startswith(f"{OP} {KEYS[0]}: {said}")
    assert good == f"{OP} {KEYS[1]}: right"


def test_what_hangs_is_ended_and_has_no_pass(table, capsys):
    start = time.monotonic()
    tune.record_passes(table, "fp16", command=of_code(*["import time; time.sleep(60)"] * 2), seconds=0.5)
    assert time.monotonic() - start < 20
    assert json.loads(table.read_text()) == OTHER
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{OP} {key}: no answer in 0.5 s: it hangs" for key in KEYS]


def test_without_a_pass_nothing_is_written_where_nothing_was(tmp_path):
    file = tmp_path / "none.json"
    tune.record_passes(file, "fp16", command=of_code(*["import sys; sys.exit(1)"] * 2), seconds=30)
    assert not file.exists()


def test_only_a_recorded_pass_makes_a_candidate(table):
    last = Place((256, 64, 56, 56), (256, 64, 1, 1), (1, 1), (0, 0), 1, torch.float16, "raw", True)
    first = last._replace(x=(256, 256, 56, 56), weight=(64, 256, 1, 1), reads="rectified")
    others = [
        last._replace(dtype=torch.bfloat16),
        last._replace(reads="activation"),
        last._replace(reads="rectified"),
        last._replace(stride=(2, 2)),
        last._replace(gradient=False),
        last._replace(weight=(128, 64, 1, 1)),
        first._replace(reads="join"),
        first._replace(bias=True),
    ]
    assert ["triton-joint" in candidates(place) for place in (last, first, *others)] == [True, True] + [False] * 8
    assert passed(torch.float16, *USES[1], CPU)
    table.write_text(
        tune.text_of(OTHER | {OP: {"*": COMPUTED} | {f"{key} of another Triton": COMPUTED for key in KEYS}})
    )
    configurations.read_table.cache_clear()
    assert not any("triton-joint" in candidates(place) for place in (last, first))


@pytest.fixture
def few(monkeypatch):
    """On the CPU, where both are references, on few rows."""
    monkeypatch.setattr(prove, "EXACT", ((1, 2, 3),))
    monkeypatch.setattr(prove, "WHOLE", (2, 3, 5))
    return torch.float16


@pytest.mark.parametrize("use", USES, ids=str)
def test_a_right_kernel_is_found_right(few, use):
    assert prove.fault(*use, few, CPU) == ""


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("dx", lambda dx: dx[0].add_(1), "dx of 1 x 2 x 3 is off by"),
        ("dw", lambda dw: dw[0, 0].fill_(torch.nan), "dw of 1 x 2 x 3 has other bits"),
        ("sums", lambda sums: sums.mul_(1 + 1e-6), "sums of 1 x 2 x 3 is off by"),
    ],
)
def test_a_wrong_kernel_is_found(few, monkeypatch, name, change, said):
    right = prove.joint

    def wrong(*arguments):
        results = right(*arguments)
        change(results[name])
        return results

    monkeypatch.setattr(prove, "joint", wrong)
    assert prove.fault(*USES[0], few, CPU).startswith(said)


def test_another_mask_is_found(few, monkeypatch):
    """One that is changed where the value is too small to count."""
    right = prove.joint

    def wrong(made, *flags):
        results = right(made, *flags)
        dx = results["dx"]
        if len(dx) == 2:  # the random ones
            dx[dx.abs() == dx.abs()[dx != 0].min()] = 0
        return results

    monkeypatch.setattr(prove, "joint", wrong)
    assert prove.fault(*USES[0], few, CPU).startswith("the mask of 2 x 3 x 5 is another for")
