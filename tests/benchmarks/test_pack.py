"""One process makes the archive of compiled kernels; another one uses it, in another checkout and folder."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import pack
from benchmarks.trace import Launch

ROOT = Path(pack.__file__).parents[1]
# Both processes make three calls of a step, each of which starts a kernel or two.
CALLS = """
import sys, torch
from pathlib import Path
from functools import partial
from unittest import mock
from benchmarks import pack
from benchmarks.trace import Chip, launches, step_calls
names = {"nvcnn::max_pool", "nvcnn::cross_entropy", "nvcnn::prepare_input"}
calls = {call.name: call for call in step_calls("lenet", 4, torch.float16) if call.name in names}
archive, cache = map(Path, sys.argv[1:3])
"""
MAKE = """
lists = {"first": [launch for call in calls.values() for launch in launches(call, pack.CHIP)]}
lists["tune"] = lists["first"][:1]  # what is in several lists is compiled once
print(pack.write(lists, archive, 2))
"""
# Takes a launch by the ops' own launchers up to the kernel that is found; nothing is collected or preloaded.
USE = """
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from kernels import configurations
from kernels.operators import operators
lists, line = pack.read(archive, cache)
assert set(lists) == {"first", "tune"} and len(lists["first"]) == 3, line
found, run = [], JITFunction.run
def run_until_launched(self, *args, warmup, **kwargs):
    return run(self, *args, warmup=True, **kwargs)
knobs.cache.dir = str(cache)
knobs.compilation.listener = lambda *, src, cache_hit, **_: found.append((src.fn.module, cache_hit))
with (
    mock.patch.object(driver, "_active", Chip(pack.CHIP)),
    mock.patch.dict("os.environ", NVCNN_KERNELS="triton"),
    mock.patch.object(JITFunction, "run", run_until_launched),
    mock.patch.object(configurations, "table_name", return_value=""),
):
    for call in calls.values():
        arguments = {name: value.meta() if hasattr(value, "meta") else value for name, value in call.arguments}
        operators[call.name].launcher(**arguments)
for module, hit in sorted(found):
    print(module, "hit" if hit else "miss")
"""


def run(folder: Path, script: str, *arguments: Path) -> list[str]:
    """Returns the lines that the script prints, run by the checkout in `folder`, with a compiler, no interpreter."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "NVCNN_KERNELS")
    }
    environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-W", "ignore", "-c", CALLS + script, *map(str, arguments)]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pack")
    (line,) = run(ROOT, MAKE, folder / pack.ARCHIVE, folder)
    assert line.startswith("0 hits, 3 misses compiled, "), line
    assert [file.name for file in folder.iterdir()] == [pack.ARCHIVE], "what it was made of is left"
    return folder / pack.ARCHIVE


@pytest.fixture
def checkout(tmp_path) -> Path:
    for package in ("benchmarks", "kernels", "nvcnn"):
        shutil.copytree(ROOT / package, tmp_path / "elsewhere" / package, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "elsewhere"


def test_another_process_of_another_checkout_finds_every_kernel(archive, checkout, tmp_path):
    lines = run(checkout, USE, archive, tmp_path / "cache")
    assert lines == [f"kernels.{op} hit" for op in ("cross_entropy", "max_pool", "prepare_input")]


def test_launches_hold_no_path_of_the_machine_that_made_them(archive):
    with tarfile.open(archive) as tar:
        launches = tar.extractfile("launches.json").read().decode()
    assert sys.prefix not in launches
    assert "libdevice" not in launches


def test_a_kernel_that_is_not_the_same_is_compiled(archive, checkout, tmp_path):
    file = checkout / "kernels/max_pool.py"
    file.write_text(file.read_text().replace("tl.maximum(largest, value", "tl.minimum(largest, value"))
    lines = run(checkout, USE, archive, tmp_path / "cache")
    assert lines == ["kernels.cross_entropy hit", "kernels.max_pool miss", "kernels.prepare_input hit"]


def test_an_archive_of_another_compiler_is_said_and_left(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "key", lambda: {**key, "ptxas and chip": "another"})
    with tarfile.open(archive) as tar:
        key = json.load(tar.extractfile("key.json"))
    lists, line = pack.read(archive, tmp_path / "cache")
    assert lists == {}
    assert line == (
        f"{archive.name} does not fit: of ptxas and chip {key['ptxas and chip']}, here another: "
        "every kernel is compiled here"
    )
    assert not (tmp_path / "cache").exists()


def test_an_archive_writes_in_its_folder_alone(archive, tmp_path):
    """Python before 3.11.4 has no filter for that."""
    hostile = tmp_path / "hostile.tar"
    (tmp_path / "deep").mkdir()
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "deep")
    with tarfile.open(hostile, "w") as tar:
        for name in ("key.json", "launches.json", "cache"):
            tar.add(tmp_path / "deep" / name, name)
        for name in ("../../out", f"{tmp_path}/out", "link", "link/out"):
            member = tarfile.TarInfo(name)
            if name == "link":
                member.type, member.linkname = tarfile.SYMTYPE, str(tmp_path)
            tar.addfile(member)
    before = sorted(path.name for path in tmp_path.iterdir())
    with mock.patch.object(tarfile, "data_filter", None, create=True):
        pack.read(hostile, tmp_path / "deep" / "cache-read")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_without_an_archive_that_is_said(tmp_path):
    assert pack.read(tmp_path / "none.tar.xz", tmp_path / "cache") == (
        {},
        "no none.tar.xz: every kernel is compiled here",
    )


def test_a_compilation_has_its_limit():
    with pytest.raises(TimeoutError, match="not compiled in 0 s"), pack.limited(0.05):
        time.sleep(60)


def test_an_outcome_in_words():
    launch = Launch("module", "kernel", 90, "{}", ())
    assert str(pack.Outcome(hits=3, compiled=2, seconds=1.2)) == "3 hits, 2 misses compiled, 1 s"
    assert "1 refused" in str(pack.Outcome(failed={launch: "why"}))
