"""A small ImageNet, its class folders, and what prepare.py makes of them."""

from pathlib import Path

import pytest

from tests.nvcnn.prepare.preparing import contents, run
from tests.raw_imagenet import Raw, make, unpack


@pytest.fixture(scope="session")
def raw(tmp_path_factory) -> Raw:
    return make(tmp_path_factory.mktemp("raw"), per_class=30)


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
    out = tmp_path / "copy"
    out.mkdir()
    for name, data in contents(prepared).items():
        (out / name).write_bytes(data)
    return out


@pytest.fixture(scope="session")
def tars(folders, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tars") / "out"
    run(folders, out, 2, file_format="webdataset")
    return out
