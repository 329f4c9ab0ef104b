"""What this rank has of the machine is found, and what it cannot use is said."""

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nvcnn import machine

OLD = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver"


@pytest.fixture
def gpu(monkeypatch):
    """Returns a function that shows a GPU which torch cannot use, with the release of CUDA that torch is built for."""

    def show(cuda: str | None, device: bool = True, tool: str | None = None) -> None:
        def init() -> None:
            raise RuntimeError(OLD)

        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "init", init)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(Path, "glob", lambda path, pattern: [path / "nvidia0"] * device)
        monkeypatch.setattr(machine.shutil, "which", lambda name: tool and name)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=tool))

    return show


def test_a_gpu_that_cannot_be_used_is_said(gpu, monkeypatch):
    gpu("13.0")
    assert "there is an NVIDIA GPU, but this runs on the CPU: The NVIDIA driver" in machine.unused_gpu()
    assert "Please update your GPU driver" in machine.unused_gpu()
    assert "\n" not in machine.unused_gpu()
    gpu(None)
    assert f"torch {torch.__version__} is a CPU build" in machine.unused_gpu()
    gpu(None, device=False, tool="GPU 0: NVIDIA H100 (UUID: GPU-1)\n")
    assert machine.unused_gpu()


def test_where_there_is_none_or_it_is_hidden_nothing_is_said(gpu, monkeypatch):
    for tool in (None, "No devices were found\n"):
        gpu("13.0", device=False, tool=tool)
        assert machine.unused_gpu() == ""
    gpu("13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.unused_gpu() == ""
    gpu("13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.unused_gpu() == ""


def test_slowness_is_measured_on_one_thread_and_leaves_things_as_they_were(monkeypatch):
    clock, used = iter([0, 8, 8, 14, 14, 21, 0, 2, 2, 5, 5, 9]), []
    monkeypatch.setattr(machine.time, "thread_time", lambda: used.append(torch.get_num_threads()) or next(clock))
    threads, drawn = torch.get_num_threads(), torch.get_rng_state()
    assert machine.slowness(torch.float16) == 3  # the quickest of three: 6 and 2
    assert set(used) == {1}
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), drawn)
