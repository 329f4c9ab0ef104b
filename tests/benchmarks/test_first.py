"""The first items on a GPU run here, too: checks of kernels in the interpreter, and steps of the test's own."""

import time
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

from benchmarks import first, ops, step
from benchmarks.replay import library
from kernels.implementation import INTERPRETED
from kernels.launch import Repetition
from nvcnn.roofline import Call, call_of

CPU = torch.device("cpu")
N, TIMES = 3, 2
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs kernels on the CPU")


def images(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16).to(memory_format=torch.channels_last)


def some_calls() -> dict[str, Call]:
    """Returns calls of each family, with most of what is fused; windows of pooling reach over the image.

    Two values that are one when rounded have another place than in float64: a large image has few of them.
    """
    nvcnn = torch.ops.nvcnn
    x, y, w = images(N, 16, 4, 3), images(N, 16, 4, 3), images(16, 16, 1, 1)
    norm, factors = torch.empty(5, 16), torch.empty(2, 16)
    center = torch.empty(16)
    through = {"y": y, "norm": norm, "factors": factors}
    pooled = torch.empty_like(images(N, 16, 2, 2), dtype=torch.uint8)
    return {
        "forward": call_of(nvcnn.convolution.default, x, w, [1, 1], [0, 0], 1, norm, x, None, center),
        "data-gradient": call_of(
            nvcnn.convolution_data_gradient.default, y, w, [4, 3], [1, 1], [0, 0], x=x, x_norm=norm, **through
        ),
        "weight-gradient": call_of(
            nvcnn.convolution_weight_gradient.default, y, x, w, [1, 1], [0, 0], x_norm=norm, **through
        ),
        "max_pool": call_of(nvcnn.max_pool.default, x, 3, 2, 1, True),
        "max_pool_backward": call_of(
            nvcnn.max_pool_backward.default, images(N, 16, 2, 2), pooled, 4, 3, 3, 2, 1
        ),
        "max_pool of a raw tensor": call_of(nvcnn.max_pool.default, images(N, 16, 40, 41), 3, 2, 1, True, norm),
        "max_pool_backward of a raw tensor": call_of(
            nvcnn.max_pool_backward.default, images(N, 16, 2, 2), pooled, 4, 3, 3, 2, 1, x, norm
        ),
        "prepare_input": call_of(
            nvcnn.prepare_input.default, torch.empty(N, 4, 4, 3, dtype=torch.uint8), torch.empty(N, dtype=torch.bool),
            torch.empty(3), torch.empty(3), torch.float16, 4,
        ),
    }  # fmt: skip


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("NVCNN_KERNELS", "triton")


@interpreted
@pytest.mark.parametrize("name", [name for name in some_calls() if name != "prepare_input"])
def test_a_right_kernel_is_right_on_few_images_on_many_and_in_a_graph(name):
    with first.poisoned():
        row = first.check(some_calls()[name], CPU, N, TIMES, graph=True)
    assert row["wrong"] == ""
    assert max(map(float, row["error"].split())) < 1e-3


@interpreted
def test_an_op_on_bytes_is_checked_too():
    """It has four images, since its vectors have three values."""
    call = call_of(
        torch.ops.nvcnn.prepare_input.default,
        *(torch.empty(4, 4, 4, 3, dtype=torch.uint8), torch.empty(4, dtype=torch.bool)),
        *(torch.empty(3), torch.empty(3), torch.float16, 4),
    )
    assert first.check(call, CPU, 4, TIMES, graph=False)["wrong"] == ""


def changed(change, when=lambda results: True):
    """Returns `outcome` with its first result changed in place."""
    real = first.outcome

    def outcome(call, made):
        results = real(call, made)
        if when(results):
            change(results[0])
        return results

    return outcome


@interpreted
@pytest.mark.parametrize(
    ("name", "change", "when", "wrong"),
    [
        ("forward", lambda y: y.mul_(1.01), lambda r: r[0].dtype == torch.float16, "3 images: 1.0e-02 "),
        ("forward", lambda y: y[-1, 0, 0, 0].fill_(float("nan")), lambda r: True, "3 images: nan "),
        ("data-gradient", lambda y: y[-1, 0, 0, 0].fill_(7), lambda r: len(r[0]) > N, "6 images: other bits in 1 of"),
        ("weight-gradient", lambda dw: dw.mul_(1.01), lambda r: r[0].dtype == torch.float16, "3 images: 1.0e-02"),
    ],
)
def test_a_wrong_kernel_is_found(name, change, when, wrong, monkeypatch):
    monkeypatch.setattr(first, "outcome", changed(change, when))
    assert first.check(some_calls()[name], CPU, N, TIMES, graph=False)["wrong"].startswith(wrong)


@interpreted
def test_a_wrong_repetition_is_found(monkeypatch):
    """A step repeats launches from its second call on, so these are checked, too."""
    real = Repetition.__call__

    def repeat(self, arguments):
        results = real(self, arguments)
        results[0][-1, 0, 0, 0] += 1
        return results

    monkeypatch.setattr(Repetition, "__call__", repeat)
    with first.configured_for(N, N):
        wrong = first.check(some_calls()["forward"], CPU, N, TIMES, graph=False)["wrong"]
    assert wrong.startswith("a second call gives other bits")


@interpreted
def test_sums_over_many_images_are_those_of_few(monkeypatch):
    """The kernel is right on few, and leaves out an image of many."""

    def outcome(call, made):
        if made["g"].shape[0] == N * TIMES:
            made["g"][-1] = 0
        return real(call, made)

    real = first.outcome
    monkeypatch.setattr(first, "outcome", outcome)
    wrong = first.check(some_calls()["weight-gradient"], CPU, N, TIMES, graph=False)["wrong"]
    assert wrong.startswith("6 images: sums off by ")


def test_few_images_are_launched_as_many(monkeypatch):
    asked = []
    table = first.conv_shape, "configuration"
    monkeypatch.setattr(*table, lambda op, key, *rest: asked.append(key) or {"BLOCK_ROWS": 16})
    x = torch.empty(8, 16, 4, 4)
    shape = first.conv_shape.conv_shape("convolution", (8, 16, 4, 4), torch.empty(16, 16, 1, 1), [1, 1], [0, 0], 1)
    with first.configured_for(8, 256):
        import_module("kernels.convolution").configured_for(
            "convolution", x, shape, "alone", lambda shape, *_: asked.append(shape.n)
        )
    assert asked == [256, "fp32 N=256 C=16 H=4 W=4 K=16 R=1 S=1 stride=1,1 padding=0,0 G=1 alone"]


def test_each_call_of_a_step_is_of_one_family(monkeypatch):
    calls = ops.layer_calls("resnet18", 8, torch.float16, *ops.CONVS)
    monkeypatch.setattr(ops, "layer_calls", lambda *_, **__: calls)
    by_family = {family: first.calls_of(family) for family in first.FAMILIES}
    found = [call for family, some in by_family.items() if family != first.OPTIMIZER for call in some]
    assert len(found) == len(set(found)) == len(calls)
    assert {call.name for call in by_family["forward"]} == {"nvcnn::convolution"}
    assert len(by_family["other-layers"]) > 10
    assert {f"nvcnn::{name}" for name in first.BY_IMAGE} <= {call.name for call in calls}


def test_a_lost_gpu_ends_a_family_and_any_other_error_does_not(monkeypatch):
    errors = iter([ValueError("refused"), None, RuntimeError("CUDA error: an illegal memory access was encountered")])
    calls = [*some_calls().values()][:4]
    written: list[list[str]] = []

    def check(call, *_, **__):
        if error := next(errors):
            raise error
        return {"name": "fine", "error": "", "wrong": ""}

    monkeypatch.setattr(first, "check", check)
    monkeypatch.setattr(first, "calls_of", lambda family: calls)
    rows = first.check_all("forward", CPU, lambda rows: written.append([row["wrong"] for row in rows]), float("inf"))
    assert [row["wrong"] for row in rows] == [
        "ValueError: refused",
        "",
        "RuntimeError: CUDA error: an illegal memory access was encountered",
    ]
    assert written[0] == ["the process ended here"], "a process that dies has left the name of the call"
    assert not torch.are_deterministic_algorithms_enabled()


def test_time_that_is_up_is_said(monkeypatch):
    monkeypatch.setattr(first, "calls_of", lambda family: [*some_calls().values()])
    (row,) = first.check_all("forward", CPU, lambda rows: None, time.monotonic() - 1)
    assert row["wrong"] == "not checked: time is up, with 8 to go"


@interpreted
def test_the_optimizer_is_checked(monkeypatch):
    monkeypatch.setattr(first, "MODEL", "trivial")
    row = first.check_optimizer(CPU)
    assert row["wrong"] == ""
    real = first.ops.Larc.step

    def without_the_weights(self):
        before = self.arena.weight.clone()
        real(self)
        if first.os.environ["NVCNN_KERNELS"] == "triton":
            self.arena.weight.copy_(before)

    monkeypatch.setattr(first.ops.Larc, "step", without_the_weights)
    row = first.check_optimizer(CPU)
    assert "differ" in row["wrong"]
    assert [float(error) > 0.1 for error in row["error"].split()] == [True, False, False, False]


def test_steps_are_measured_in_turns_and_one_that_fails_says_why():
    case = SimpleNamespace(device=CPU, batch=4)

    def sleeps(ms):
        return lambda: lambda: time.sleep(ms / 1e3)

    def broken():
        raise RuntimeError("out of memory")

    written = []
    makes = {"a, eager": sleeps(40), "a, graph": sleeps(10), "b, eager": sleeps(20), "b, graph": broken}
    rows, steps = first.measure_steps(case, makes, lambda rows: written.append(rows), rounds=2)
    a, b = rows
    assert [*steps] == ["a, eager", "a, graph", "b, eager"]
    assert a["eager ms"] > a["graph ms"] >= 10
    assert a["host ms"] >= 40
    assert a["images/s"] == pytest.approx(4e3 / a["graph ms"], rel=1e-3)
    assert b["graph ms"] is None
    assert b["images/s"] == pytest.approx(4e3 / b["eager ms"], rel=1e-3)
    assert b["note"].endswith("; graph: RuntimeError: out of memory")
    assert "deterministic" in a["note"]
    assert written[0][0]["note"].endswith("eager: the process ended here")


def test_the_contenders_are_each_algorithm_twice_and_torchvision(monkeypatch):
    monkeypatch.setattr(step, "ours", lambda *_, **options: options)
    makes = first.contenders(step.GPU)
    assert [*makes] == [f"nvcnn --conv={conv}, {how}" for conv in first.STEPS for how in ("eager", "graph")] + [
        "torchvision, eager"
    ]
    assert makes["nvcnn --conv=auto, graph"]() == {"cuda_graph": "on"}


def test_a_profile_has_the_most_of_a_step():
    a = torch.randn(64, 64)
    rows = first.profiled("ours", lambda: [a @ a for _ in range(5)], CPU, most=3)
    calls = {row["name"]: row["calls"] for row in rows}
    assert calls["ours: aten::mm"] == 5
    assert len(rows) <= 3
    assert sum(row["share"] for row in rows) <= 1.01


@pytest.mark.parametrize("name", ["forward", "data-gradient", "weight-gradient"])
def test_the_library_s_convolution_computes_what_ours_does_alone(name, monkeypatch):
    """Fused calls give it their tensors, and it leaves the fusion out."""
    monkeypatch.setenv("NVCNN_KERNELS", "reference")
    call = some_calls()[name]
    kept = ("x", "weight", "g", "out", "size", "stride", "padding")
    if name == "data-gradient":
        kept = kept[1:]
    made = {key: v for key, v in first.arguments(call, CPU).items() if key in kept}
    made = first.each_tensor(torch.Tensor.double, made)
    (ours, *_) = first.outcome(call, first.copied(made))
    theirs = library(call)(**first.arguments(call, CPU) | made)
    theirs = [t for t in (theirs if isinstance(theirs, tuple) else [theirs]) if t is not None]
    assert len(theirs) == 1
    torch.testing.assert_close(ours, theirs[0])
