"""All of it but the GPU: parts are small modules of the test's own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.layers import all_layers


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that `python -m` finds; returns its name."""
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{path}" if path else str(tmp_path))

    def write(name: str, text: str) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        return name

    return write


def test_without_a_gpu_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no CUDA device" in line


def test_a_part_ends_with_its_exit_code_and_its_output_is_kept(module, tmp_path, capfd):
    name = module("part_fails", "print('hello'); raise SystemExit(3)")
    assert gpu.run_part([name], tmp_path / "log", limit=60) == 3
    assert (tmp_path / "log").read_text() == capfd.readouterr().out == "hello\n"


def test_a_part_is_ended_at_its_limit_with_its_children(module, tmp_path):
    pids = tmp_path / "pids"
    name = module(
        "part_hangs",
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "print('begun')\n"
        "time.sleep(60)\n",
    )
    start = time.monotonic()
    assert gpu.run_part([name], tmp_path / "log", limit=5) is None
    assert time.monotonic() - start < 30
    assert (tmp_path / "log").read_text() == "begun\n"
    while any(map(runs, pids.read_text().split())):
        assert time.monotonic() - start < 30, "a process of the part outlived it"
        time.sleep(0.1)


def runs(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


TESTS = """
import pytest

@pytest.mark.parametrize("x", ["a b", "FAILED"])
def test_good(x): pass
def test_bad():
    print("tests/not_a_test.py::x PASSED")
    assert False, "tests/not_a_test.py::x PASSED"
@pytest.mark.skip(reason="why")
def test_skipped(): pass
@pytest.fixture
def broken(): raise RuntimeError
def test_broken(broken): pass
"""


def pytest_log(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-vv", "-p", "no:cacheprovider", *arguments, "tests"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout


def test_the_tests_are_counted(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_one.py").write_text(TESTS)
    log = pytest_log(tmp_path)
    (row,) = gpu.test_rows(log, "exit code 1")
    assert (row["ours"], row["peer"], row["ratio"]) == (2, 4, 0.5), log
    assert row["note"] == "exit code 1; 1 skipped; tests/test_one.py::test_bad; tests/test_one.py::test_broken"

    (cut_off,) = gpu.test_rows(log[: log.index("test_bad")], "ended at the limit of 480 s")
    assert (cut_off["ours"], cut_off["peer"]) == (2, 2)
    assert cut_off["note"].startswith("ended at the limit")


def test_a_file_that_cannot_be_imported_is_a_failure(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_one.py").write_text("import no_such_package")
    (row,) = gpu.test_rows(pytest_log(tmp_path), "exit code 2")
    assert (row["ours"], row["peer"]) == (0, 1)
    assert row["note"].endswith("tests/test_one.py")


FAKE = """
import sys
from benchmarks import report, timing
file = sys.argv[-1].removeprefix("--json=")
rows = [timing.row("{name} / floor", "us", [1.25, 1.25], [1.0, 1.0])]
report.write(file, "{name}", rows)
raise SystemExit({code})
"""


@pytest.fixture
def machine(monkeypatch, module):
    """A machine with a GPU, where `ops` fails after its first row."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    parts = {
        "tests": [module("part_tests", "print('tests/test_a.py::test_b PASSED [100%]')")],
        "ops": [module("part_ops", FAKE.format(name="ops", code=1))],
        "step": [module("part_step", FAKE.format(name="step", code=0))],
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    return "nvidia-h100-80gb-hbm3"


def test_all_parts_run_and_what_a_failing_one_wrote_is_kept(machine, tmp_path, capfd):
    out = tmp_path / "results"
    assert gpu.main(["--out", str(out)]) == 1
    assert capfd.readouterr().out.splitlines()[-1] == "ops: exit code 1"
    names = {f"{machine}.{part}.{kind}" for part in ("tests", "ops", "step") for kind in ("json", "log")}
    assert {file.name for file in out.iterdir()} == names | {f"{machine}.md", f"{machine}.png"}
    assert json.loads((out / f"{machine}.ops.json").read_text())["rows"][0]["ratio"] == 0.8
    text = (out / f"{machine}.md").read_text()
    assert "| tests passed / run | 1 | 1 |" in text
    assert "| ops / floor | 1250.0 | 1000.0 | us | 0.8 |" in text


def test_one_part_leaves_the_results_of_the_others(machine, tmp_path, capfd):
    out = tmp_path / "results"
    gpu.main(["ops", "--out", str(out)])
    assert gpu.main(["step", "--out", str(out)]) == 0
    text = (out / f"{machine}.md").read_text()
    assert "ops / floor" in text
    assert "step / floor" in text
    assert "tests" not in text
    capfd.readouterr()


def test_a_failing_test_is_the_exit_code(machine, tmp_path, module, capfd):
    module("part_tests", "print('tests/test_a.py::test_b FAILED [100%]'); raise SystemExit(1)")
    assert gpu.main(["tests", "--out", str(tmp_path)]) == 1
    assert "tests: exit code 1" in capfd.readouterr().out


def test_the_parts_are_there():
    for layer in all_layers():
        assert sum(any(name in layer.name for name in gpu.PARTS[part][1:]) for part in ("layers", "conv")) == 1
    for module in ("ops", "layers", "step"):
        assert gpu.PARTS[module][0] == f"benchmarks.{module}"
        assert (Path(gpu.__file__).parent / f"{module}.py").exists()
    root = Path(gpu.__file__).parents[1]
    assert all((root / part).exists() for part in gpu.PARTS["tests"] if part.startswith("tests/"))
