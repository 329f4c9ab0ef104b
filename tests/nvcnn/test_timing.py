"""Steps are timed in turns, for as long as asked, and as CUDA graphs."""

import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from nvcnn import timing

CPU, GPU = torch.device("cpu"), torch.device("cuda")


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


def test_a_captured_step_does_what_the_step_does(device):
    x = torch.zeros(1, device=device)
    step = timing.captured(lambda: x.add_(1), device)
    before = x.item()
    step()
    step()
    assert x.item() == before + 2


class Cuda:
    """Stands in for torch.cuda: which stream is current, and what happens on it."""

    def __init__(self, monkeypatch):
        self.current, self.done, cuda = "main", [], self

        class Stream:
            name = "side"

            def wait_stream(self, other):
                cuda.done.append(f"{self.name} waits for {other.name}")

        class Main(Stream):
            name = "main"

        class Graph:
            def replay(self):
                cuda.done.append("replay")

        @contextmanager
        def graph(graph, pool, stream, capture_error_mode):
            """Captures as torch does: where the capture fails, its stream stays the current one."""
            assert (cuda.current, stream.name, capture_error_mode) == ("side", "side", "thread_local")
            cuda.done.append("capture")
            yield
            cuda.done.append("captured")

        @contextmanager
        def stream(of):
            before, cuda.current = cuda.current, of.name
            try:
                yield
            finally:
                cuda.current = before

        for name, value in {
            "CUDAGraph": Graph, "Stream": Stream, "current_stream": Main, "graph": graph, "stream": stream,
            "graph_pool_handle": lambda: "pool",
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_step_is_captured_on_the_stream_it_was_warmed_up_on(monkeypatch):
    cuda = Cuda(monkeypatch)
    replay = timing.captured(lambda: cuda.done.append(f"step on {cuda.current}"), GPU)
    ways = ["side waits for main", "step on side", "capture", "step on side", "captured", "main waits for side"]
    assert cuda.done == ways
    replay()
    assert cuda.done[-1] == "replay"


def test_what_a_captured_step_reads_stays_as_long_as_its_replay(monkeypatch):
    Cuda(monkeypatch)
    x = torch.ones(1)
    there = weakref.ref(x)
    replay = timing.captured(partial(x.add_, 1), GPU)
    del x
    replay()
    assert there() is not None
    del replay
    assert there() is None


@pytest.mark.parametrize("fails", [1, 2])
def test_a_step_that_fails_leaves_the_stream_as_it_was(monkeypatch, fails):
    cuda, calls = Cuda(monkeypatch), []

    def step():
        calls.append(cuda.current)
        if len(calls) == fails:
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        timing.captured(step, GPU)
    assert calls == ["side"] * fails
    assert cuda.current == "main"


def test_sets_exceed_the_cache_of_a_gpu():
    assert timing.sets(timing.CACHE + 1, GPU) == 1
    assert timing.sets(timing.CACHE // 3, GPU) == 4
    assert timing.sets(1, CPU) == 1


def test_a_load_lasts_as_long_as_asked(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def step():
        calls.append(clock[0])
        clock[0] += 0.1

    timing.load({"a": step, "b": step}, CPU, 0.55)
    assert len(calls) == 6
    timing.load({"a": step}, CPU, 0.0)
    assert len(calls) == 6
