"""mutations.toml is a list of faults that somebody could make; each is noticed by the tests that it names."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MUTATIONS = tomllib.loads((ROOT / "tests/mutations.toml").read_text())["mutation"]
# Of a mutation that breaks more than it should: tests must notice what is computed.
BROKEN = re.compile(r"^E +(ImportError|ModuleNotFoundError|SyntaxError|IndentationError|NameError)\b", re.MULTILINE)


def test_the_list_fits_the_sources():
    for mutation in MUTATIONS:
        assert (ROOT / mutation["file"]).read_text().count(mutation["old"]) == 1, mutation
        assert mutation["old"] != mutation["new"], mutation
        assert mutation["caught_by"], mutation
        for test in mutation["caught_by"]:
            assert (ROOT / test.partition("::")[0]).is_file(), mutation


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files, as they are here and now."""
    copy = tmp_path_factory.mktemp("tree")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), tracked.split("\0")):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.mark.full
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation["file"])
def test_is_caught(tree, mutation):
    file = tree / mutation["file"]
    text = file.read_text()
    file.write_text(text.replace(mutation["old"], mutation["new"]))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation["caught_by"]]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)
    finally:
        file.write_text(text)
    assert done.returncode == 1, done.stdout + done.stderr  # 1: tests failed; others: no such test, a wrong command
    assert not BROKEN.search(done.stdout), done.stdout
