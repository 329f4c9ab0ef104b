"""Starts the programs of launch/ as users do: real processes, real mpiexec, real records."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from nvcnn.prepare.fashion_mnist import png
from tests.end_to_end.warm import Warm
from tests.samples import write_split

ROOT = Path(__file__).parents[2]
TIMEOUT = 600  # seconds; a run here takes 10, on cores that nobody else wants


@dataclass
class Program:
    """Is a started program: `wait()` returns its exit code, `text()` what it printed so far, errors included."""

    process: subprocess.Popen | Warm
    output: Path

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait(self, timeout: float = TIMEOUT) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"hangs after {timeout} s:\n{self.text()}")

    def until(self, pattern: str, timeout: float = TIMEOUT) -> None:
        """Waits until a line that matches `pattern` is there."""
        end = time.monotonic() + timeout
        while not re.search(pattern, self.text(), re.MULTILINE):
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"ended, or {timeout} s passed, without {pattern!r}:\n{self.text()}")
            time.sleep(0.05)

    def ranks(self) -> list[int]:
        """The process numbers of the ranks that mpiexec started."""
        found = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True).stdout.split()
        return [int(pid) for pid in found]


@dataclass
class Launcher:
    """Starts programs in this process' environment, without what the tests themselves set."""

    directory: Path
    started: list[Program] = field(default_factory=list)

    def start(
        self,
        script: str,
        *arguments: object,
        ranks: int = 1,
        environment: dict[str, str] | None = None,
        warm: bool = True,
        prefix: Sequence[object] = (),
    ) -> Program:
        """Starts a program; `warm`: what it imports may have been imported before, where that cannot be seen.

        prefix: words before its command, of a program that starts it.
        """
        env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "NVCNN_KERNELS")}
        env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} | (environment or {})
        output = self.directory / f"output-{len(self.started)}.txt"
        output.touch()
        process: Warm | subprocess.Popen
        if warm and not prefix and ranks == 1 and "TRITON_INTERPRET" not in env:
            process = Warm(output, self.directory, env, ROOT / script, list(map(str, arguments)))
        else:
            program = [sys.executable, ROOT / script, *arguments]
            if ranks > 1:
                program = [mpiexec(), "--bind-to", "none", "--oversubscribe", "-np", ranks, *program]
            program = [*prefix, *program]
            with output.open("wb") as file:
                process = subprocess.Popen(
                    list(map(str, program)),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=env,
                    cwd=self.directory,
                )
        self.started.append(Program(process, output))
        return self.started[-1]

    def run(self, script: str, *arguments: object, ranks: int = 1, code: int = 0, **options) -> str:
        """Runs to the end and checks the exit code; returns what was printed."""
        program = self.start(script, *arguments, ranks=ranks, **options)
        assert program.wait() == code, program.text()
        return program.text()

    def train(self, *arguments: object, **options) -> str:
        return self.run("launch/train.py", *arguments, **options)


def mpiexec() -> str:
    found = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "no mpiexec in the environment or on PATH: run make env"
    return found


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    yield launcher
    for program in launcher.started:
        if program.process.poll() is None:
            program.process.send_signal(signal.SIGKILL)


def picture(seed: int, label: int) -> bytes:
    """Returns a 28 x 28 PNG of noise with a bright bar at the label's place: LeNet learns it in a few steps."""
    pixels = torch.randint(0, 100, (28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    pixels[2 * label + 4 : 2 * label + 6] = 250
    return png(pixels.numpy().tobytes(), 28, 28)


def write_records(directory: Path, *, train: int, validation: int, classes: int = 10, shards: int = 2) -> Path:
    """Writes records without dataset.json: give --num_classes."""
    directory.mkdir()
    for split, images in (("train", train), ("validation", validation)):
        write_split(directory, split, images, shards, lambda i: picture(i, i % classes), lambda i: i % classes + 1)
    return directory


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a directory with 640 training and 101 validation images of 10 classes."""
    return write_records(tmp_path_factory.mktemp("records") / "bars", train=640, validation=101)


def last_checkpoint(log_dir: Path) -> dict:
    return torch.load(max(log_dir.glob("checkpoint-[0-9]*.pt")), weights_only=True)


def assert_same_bits(one: Any, other: Any, where: str = "checkpoint") -> None:
    """Compares two checkpoints: all that they hold but the settings, of which some may differ."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one.keys() - {"settings"}:
            assert_same_bits(one[name], other[name], f"{where}, {name}")
    elif isinstance(one, list):
        for rank, pair in enumerate(zip(one, other, strict=True)):
            assert_same_bits(*pair, f"{where}, {rank}")
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, where
