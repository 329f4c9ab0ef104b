"""Makes a small ImageNet, its class folders, and what prepare.py makes of them."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.nvcnn.prepare.preparing import run
from tests.raw_imagenet import Raw, make, unpack

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """Leaves fsync out. Only a loss of power could tell the difference, and test_tfrecord.py sees that it is called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> Raw:
    return make(tmp_path_factory.mktemp("raw"), per_class=10)


@pytest.fixture(scope="session")
def folders(raw, tmp_path_factory) -> tuple[Path, Path]:
    return unpack(raw, tmp_path_factory.mktemp("folders"))


@pytest.fixture(scope="session")
def prepared(folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    run(folders, out)
    return out


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    return shutil.copytree(prepared, tmp_path / "copy")


@pytest.fixture(scope="session")
def tars(folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tars") / "out"
    run(folders, out, 2, file_format="webdataset")
    return out


@pytest.fixture(scope="session")
def main() -> Callable[[list[str]], int]:
    """Returns the program's function, which takes its arguments and returns its exit code."""
    spec = importlib.util.spec_from_file_location("launch_prepare", ROOT / "launch" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main
