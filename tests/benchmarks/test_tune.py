"""The search runs on ops in the interpreter; a clock of the test's own times them."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import pack, tune
from benchmarks.ops import layer_calls
from benchmarks.replay import argument_sets, arguments, describe, outcome, replay
from kernels import configurations
from kernels.implementation import INTERPRETED
from nvcnn.roofline import call_of

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs kernels on the CPU")


@pytest.fixture
def calls(monkeypatch):
    monkeypatch.setenv("NVCNN_KERNELS", "triton")
    return {
        call.name: call for call in reversed(layer_calls("lenet", 2, torch.float32, "torch"))
    }  # the first of each name


def test_the_calls_are_those_of_the_layers_of_a_step(calls):
    names = {"prepare_input", "max_pool", "max_pool_backward", "cross_entropy"}
    assert set(calls) == {f"nvcnn::{name}" for name in names}


def test_arguments_are_valid_ones(calls):
    made = arguments(calls["nvcnn::cross_entropy"], CPU)
    assert made["targets"].dtype == torch.int64
    assert made["targets"].max() < made["logits"].shape[1] == 1000
    call = calls["nvcnn::max_pool_backward"]
    assert arguments(call, CPU)["argmax"].max() < call["kernel_size"] ** 2
    assert describe(calls["nvcnn::max_pool"]) == "max_pool 32 x 28 x 28 with_argmax"


@interpreted
def test_a_replayed_call_runs(calls):
    call = calls["nvcnn::cross_entropy"]
    made = argument_sets(call, CPU)
    replay(call.op, made)()
    assert len(made) == 1


@interpreted
def test_the_search_ends_at_the_best_that_agrees(calls, tmp_path, monkeypatch, capsys):
    """The clock likes large blocks; 8 warps do not compile; blocks of 128 channels give wrong numbers."""
    call = calls["nvcnn::max_pool"]
    wrong = {"BLOCK_C": 128}
    agrees = tune.agrees
    seen = []

    def current():
        (config,) = configurations.answers.values()
        return config

    def clock(call):
        call.op(**arguments(call, CPU))
        config = current()
        seen.append(config)
        if config["num_warps"] == 8:
            raise RuntimeError("out of resource: shared memory")
        return 1000 / (config["BLOCK_C"] + min(config["BLOCK_PIXELS"], 64))

    def agrees_unless_wrong(call, device, expected):
        return agrees(call, device, expected) and not wrong.items() <= current().items()

    monkeypatch.setattr(tune, "agrees", agrees_unless_wrong)
    file = tmp_path / "gpu.json"
    other = {"other_op": {"key": {"BLOCK": 1}}}
    file.write_text(json.dumps(other))
    tune.tune(tune.Counter([call]), CPU, file, clock=clock, seconds=100)
    table = json.loads(file.read_text())
    ((key, best),) = table["max_pool"].items()
    assert key == "fp32 C=32 kernel=2 stride=2"
    assert best == {"BLOCK_C": 64, "BLOCK_PIXELS": 64, "num_warps": 4}
    assert table["other_op"] == other["other_op"]
    assert "times as fast" in capsys.readouterr().out
    assert len(seen) == len({tuple(config.items()) for config in seen}), "a configuration was timed twice"


@interpreted
def test_what_is_tuned_is_what_a_launch_uses(calls, tmp_path, monkeypatch):
    call = calls["nvcnn::max_pool"]
    tuned = {"BLOCK_C": 16, "BLOCK_PIXELS": 16, "num_warps": 2}
    monkeypatch.setattr(configurations, "TABLES", tmp_path)
    monkeypatch.setattr(configurations, "table_name", lambda device: "some-gpu")
    configurations.read_table.cache_clear()
    (tmp_path / "some-gpu.json").write_text(tune.text_of({"max_pool": {"fp32 C=32 kernel=2 stride=2": tuned}}))
    call.op(**arguments(call, CPU))
    configurations.read_table.cache_clear()
    assert configurations.answers["max_pool", "fp32 C=32 kernel=2 stride=2"] == tuned


@interpreted
def test_when_time_is_up_what_is_done_is_kept(calls, tmp_path, capsys):
    file = tmp_path / "gpu.json"
    tune.tune(tune.Counter(calls.values()), CPU, file, clock=lambda call: 1.0, seconds=0)
    assert not file.exists()
    assert "time is up" in capsys.readouterr().out


@interpreted
def test_a_lost_device_is_not_a_slow_configuration(calls, tmp_path):
    def clock(call):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        tune.tune(tune.Counter([calls["nvcnn::max_pool"]]), CPU, tmp_path / "t.json", clock=clock, seconds=100)


@interpreted
def test_what_has_no_time_is_no_entry(calls, tmp_path, capsys):
    def clock(call):
        raise RuntimeError("out of resource: shared memory")

    file = tmp_path / "t.json"
    tune.tune(tune.Counter([calls["nvcnn::max_pool"]]), CPU, file, clock=clock, seconds=100)
    assert not file.exists()
    assert "has no time: not in the table" in capsys.readouterr().out


@interpreted
def test_what_does_not_compile_is_not_timed_and_so_many_keys_are_tuned(calls, tmp_path):
    timed = []

    def clock(call):
        call.op(**arguments(call, CPU))
        timed.extend(configurations.answers.values())
        return 1.0

    def none_but_more_warps(call, op, key, configs):
        return [config for config in configs if config["num_warps"] == 8]

    file = tmp_path / "t.json"
    options = {"clock": clock, "seconds": 100, "keys": 1, "compilable": none_but_more_warps}
    tune.tune(tune.Counter(calls.values()), CPU, file, **options)
    assert [len(entries) for entries in json.loads(file.read_text()).values()] == [1]
    assert [config["num_warps"] for config in timed] == [4, 8]


@interpreted
def test_a_weights_gradient_fits_halves_however_many_pixels_there_are(monkeypatch):
    monkeypatch.setenv("NVCNN_KERNELS", "reference")
    n, k, c = 256, 16, 16
    halves = [torch.empty(n, c, 40, 40, dtype=torch.float16).to(memory_format=torch.channels_last) for _ in range(3)]
    dw = torch.empty(k, c, 1, 1, dtype=torch.float16).to(memory_format=torch.channels_last)
    g, x, y = halves
    more = {"y": y, "norm": torch.empty(5, k), "factors": torch.empty(2, k), "x_norm": torch.empty(5, c)}
    call = call_of(torch.ops.nvcnn.convolution_weight_gradient.default, g, x, dw, [1, 1], [0, 0], **more)
    (dw,) = outcome(call, arguments(call, CPU))
    assert 1 < dw.abs().max() < 6e3, "ten times more pixels would not overflow"
    noise = dw.float().std() / dw.float().abs().mean()
    assert noise > 0.3, "the pixels' own part counts"


def test_the_neighbours_of_a_configuration():
    around = list(tune.neighbours({"BLOCK": 1, "TMA": 0, "num_warps": 16}))
    assert around == [
        *({"BLOCK": 2, "TMA": 0, "num_warps": 16}, {"BLOCK": 1, "TMA": 1, "num_warps": 16}),
        {"BLOCK": 1, "TMA": 0, "num_warps": 8},
    ]
    around = list(tune.neighbours({"PERSISTENT": 0, "TMA": 0, "BOX_H": 8, "BOX_W": 16}))
    assert [(config["PERSISTENT"], config["TMA"], config["BOX_W"]) for config in around] == [
        *((264, 0, 16), (0, 1, 16), (0, 1, 1)),
    ]
    around = list(tune.neighbours({"PERSISTENT": 264, "TMA": 1, "BOX_H": 8, "BOX_W": 16, "maxnreg": 128}))
    assert [config["PERSISTENT"] for config in around] == [0, 528, 132, *(264,) * 6]
    boxes = [(config["BOX_H"], config["BOX_W"]) for config in around]
    assert boxes == [*((8, 16),) * 4, (16, 16), (4, 16), (4, 32), (16, 8), (8, 16)]
    assert [config["maxnreg"] for config in around] == [*(128,) * 8, 255]


@interpreted
def test_sums_over_other_parts_agree(monkeypatch):
    """The best has larger tiles of rows, and so fewer parts."""
    x, w = (torch.empty(shape).to(memory_format=torch.channels_last) for shape in ((2, 8, 5, 5), (8, 8, 1, 1)))
    convolution = torch.ops.nvcnn.convolution.default
    call = call_of(convolution, x, w, [1, 1], [0, 0], center=torch.empty(8))
    monkeypatch.setenv("NVCNN_KERNELS", "triton")
    start = {"BLOCK_ROWS": 16, "BLOCK_OUT": 16, "BLOCK_IN": 16, "num_warps": 4, "num_stages": 2}

    def clock(call):
        call.op(**arguments(call, CPU))
        (config,) = configurations.answers.values()
        return 1000 / config["BLOCK_ROWS"]

    (key,) = tune.looked_up(lambda: call.op(**arguments(call, CPU)), {"convolution": {"*": start}})
    best, cost, first = tune.climb(call, *key, start, CPU, {}, clock)
    assert (best["BLOCK_ROWS"], cost, first) == (256, 1000 / 256, 1000 / 16), "more than MOST_ROWS is refused"


def test_wrong_numbers_do_not_agree(calls):
    call = calls["nvcnn::prepare_input"]
    expected = tune.results(call, CPU)
    assert tune.agrees(call, CPU, expected)
    expected[0][0, 0, 0, 0] += 1000
    assert not tune.agrees(call, CPU, expected)
    expected[0][0, 0, 0, 0] = float("nan")
    assert not tune.agrees(call, CPU, expected)


def test_without_a_gpu_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune"])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert tune.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no CUDA device" in line


def test_what_is_compiled_ahead_are_the_rings_around_a_configuration():
    start = {"BLOCK": 4, "num_warps": 16}
    around = list(tune.neighbours(start))
    assert tune.within(start, 0) == [start]
    assert tune.within(start, 1) == [start, *around]
    two = tune.within(start, 2)
    assert {"BLOCK": 16, "num_warps": 16} in two
    assert {"BLOCK": 8, "num_warps": 8} in two
    assert len(two) == len({tuple(config.items()) for config in two}) == 1 + 3 + 5


def test_what_spills_or_the_compiler_or_the_launcher_refuses_is_not_tried(monkeypatch):
    def launch(config):
        return tune.Launch("module", "kernel", 90, str(config), ())

    def candidate(call, op, key, config, chip):
        return [] if config["BLOCK"] == 1 else [launch(config)]

    def compiled(launch):
        if "4" in launch.specialization:
            raise RuntimeError("the compiler's reason")
        return SimpleNamespace(asm={"cubin": launch.specialization})

    monkeypatch.setattr(tune, "candidate", candidate)
    monkeypatch.setattr(pack, "compiled", compiled)
    monkeypatch.setattr(pack, "resource_usage", lambda cubin: (255, 16 if "8" in cubin else 0))
    totals = pack.Outcome(hits=1)
    configs = [{"BLOCK": n} for n in (1, 2, 4, 8)]
    pool = SimpleNamespace(map=map)
    left = tune.compiled_ahead(None, "op", "key", configs, pool=pool, chip=90, totals=totals)
    assert left == [{"BLOCK": 2}]
    assert list(totals.failed.values()) == ["RuntimeError: the compiler's reason", "16 bytes of spills"]
    assert pack.compile_one(launch(configs[3]))[1] == "", "other parts compile what a step launches, whatever it is"


def test_a_dry_run_lists_the_heaviest_keys():
    """It runs in a process of its own, where the compiler is asked, and not the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.tune", "--model=lenet", "--batch=8", "--keys=3", "--dry_run"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    assert all(re.search(r": fp16 .*: from \{.*\}, \d+ neighbours, about \d+ s$", line) for line in lines)
