"""`make gpu` runs here without a GPU: its parts are small modules of the test's own."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, report
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


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Returns the folder into which the items write."""
    folder = tmp_path / "rows"
    folder.mkdir()
    monkeypatch.setattr(gpu, "FOLDER", folder)
    monkeypatch.setattr(gpu.pack, "CACHE", tmp_path / "cache")
    return folder


def test_an_item_ends_with_its_exit_codes_and_its_output_is_kept(module, folder, capfd):
    commands = (module("fails", "print('hello'); raise SystemExit(3)"),), (module("works", "print('hello')"),)
    assert gpu.run_item(gpu.Item("two", 1, commands, quiet=False), limit=60) == [3, 0]
    assert (folder / "two.log").read_text() == capfd.readouterr().out == "hello\n" * 2


def test_the_commands_of_an_item_run_side_by_side(module):
    """Each command waits for the other's file."""
    meet = """
import sys, time
from pathlib import Path
own, other = map(Path, sys.argv[1:])
own.touch()
while not other.exists(): time.sleep(0.05)
"""
    name = module("meets", meet)
    commands = (name, "{folder}/a", "{folder}/b"), (name, "{folder}/b", "{folder}/a")
    assert gpu.run_item(gpu.Item("both", 1, commands), limit=60) == [0, 0]


def test_an_item_is_told_what_is_left_and_where_kernels_are(module, folder, tmp_path):
    name = module("says", "import os, sys; print(*sys.argv[1:], os.environ['TRITON_CACHE_DIR'])")
    gpu.run_item(gpu.Item("says", 1, ((name, "--json={folder}/a.json", "{seconds}", "{minutes}"),)), limit=80)
    assert (folder / "says.log").read_text() == f"--json={folder}/a.json 65 1.00 {tmp_path}/cache\n"


def test_an_item_is_ended_at_its_limit_with_its_children(module, folder, tmp_path):
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
    assert gpu.run_item(gpu.Item("hangs", 1, ((name,),)), limit=5) == [None]
    assert time.monotonic() - start < 30
    assert (folder / "hangs.log").read_text() == "begun\n"
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


@pytest.mark.parametrize("words", [["--json=/root/out/rows.json"], ["--json", "/root/rows.json"], ["--out", "/root"]])
def test_a_command_names_no_file_that_it_wrote(words):
    assert report.command("ops", ["layers", *words, "--seconds=60"]) == "python -m benchmarks.ops layers --seconds=60"


def pytest_log(folder: Path, *arguments: str) -> str:
    """Runs the tests of the folder as `make gpu` runs the project's, whose own options make pytest say less."""
    shutil.copy(Path(gpu.__file__).parents[1] / "pyproject.toml", folder)
    command = [sys.executable, "-m", *gpu.PYTEST[:4], *arguments, "tests"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout


@pytest.mark.parametrize("arguments", [(), ("-n", "2")])
def test_the_tests_are_counted(tmp_path, arguments):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_one.py").write_text(TESTS)
    log = pytest_log(tmp_path, *arguments)
    (row,) = gpu.test_rows(log, "exit code 1")
    assert (row["ours"], row["peer"], row["ratio"]) == (2, 4, 0.5), log
    note, skipped, *bad = row["note"].split("; ")
    assert (note, skipped) == ("exit code 1", "1 skipped")
    assert set(bad) == {"tests/test_one.py::test_bad", "tests/test_one.py::test_broken"}
    if arguments:  # workers' results come in any order
        return
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
LAYER = {"name": "convolution", "calls": 2, "ours": 2.0, "cuDNN alone": None, "floor": 1.0, "unit": "us", "share": 0.5}


@pytest.fixture
def machine(monkeypatch, module):
    """Stands in for a machine with a GPU, where the second item of the first part fails after its first row."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(gpu, "card", lambda: {"power.limit": "700 W"})
    wrong = [{"name": "fine", "error": "1e-4", "wrong": ""}, {"name": "off", "error": "1", "wrong": "8 images: 1"}]
    layers = f"from benchmarks import report; import sys; report.write(sys.argv[1][7:], 'ops', [{LAYER}])"
    checks = f"from benchmarks import report; import sys; report.write(sys.argv[1][7:], 'first', {wrong})"
    tests = "print('tests/test_a.py::test_b PASSED [100%]')"
    parts = {
        "first": gpu.Part(
            1000,
            (
                gpu.one("checks-forward", 100, module("part_checks", checks)),
                gpu.one("ops", 100, module("part_ops", FAKE.format(name="ops", code=1))),
                gpu.one("probes", 100, "no_such_module"),
                gpu.one("long", 990, "part_ops"),
                gpu.one("layers", 990, module("part_layers", layers), least=10),
            ),
        ),
        "tests": gpu.Part(
            1000,
            (
                gpu.Item(
                    "tests",
                    1,
                    ((module("part_tests", tests),),),
                ),
            ),
        ),
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "available", lambda item: item.name != "probes")
    return "nvidia-h100-80gb-hbm3"


def test_all_parts_run_and_what_a_failing_item_wrote_is_kept(machine, tmp_path, capfd):
    out = tmp_path / "results"
    assert gpu.main(["--out", str(out)]) == 1
    printed = capfd.readouterr().out
    assert printed.splitlines()[-1] == "ops: exit code 1"
    assert "== probes: left out, there is no no_such_module" in printed
    assert re.search(r"== long: left out, 9\d\d s of 1000 are left, and it takes 990", printed)
    assert "PASSED" not in printed
    assert "8 images: 1" in printed
    assert "fine" not in printed
    assert {file.name for file in out.iterdir()} == {f"{machine}.{end}" for end in ("json", "md", "png", "log")}
    content = json.loads((out / f"{machine}.json").read_text())
    assert list(content["sections"]) == ["first-machine", "checks-forward", "ops", "layers", "tests-machine", "tests"]
    assert content["sections"]["first-machine"]["machine"]["card"] == {"power.limit": "700 W"}
    assert content["sections"]["ops"]["rows"][0]["ratio"] == 0.8
    assert gpu.shares_of(content) == {"ops": 0.8, "convolution": 0.5}
    text = (out / f"{machine}.md").read_text()
    assert re.search(r"\| tests passed / run \| 1 \| 1 \|.*left out: tests/nvcnn/data", text)
    assert "| ops / floor | 1250.0 | 1000.0 | us | 0.8 |" in text
    assert "| convolution | 2 | 2.0 | - | 1.0 | us | 0.5 |" in text


def test_the_results_of_two_calls_are_one_table(machine, tmp_path, capfd):
    for part in ("first", "tests"):
        gpu.main([part, "--out", str(tmp_path / part)])
    files = [str(tmp_path / part / f"{machine}.json") for part in ("first", "tests")]
    assert gpu.main(["summary", *files, "--out", str(tmp_path / "both")]) == 0
    text = (tmp_path / f"both/{machine}.md").read_text()
    assert "ops / floor" in text
    assert "tests passed" in text
    capfd.readouterr()


def test_a_failing_test_is_the_exit_code(machine, tmp_path, module, capfd):
    module("part_tests", "print('tests/test_a.py::test_b FAILED [100%]'); raise SystemExit(1)")
    assert gpu.main(["tests", "--out", str(tmp_path / "results")]) == 1
    printed = capfd.readouterr().out
    assert "tests: exit code 1" in printed
    assert "FAILED [100%]" in printed, "the end of what fails is shown"


def test_an_unknown_part_is_bad_usage(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["firts"])
    assert "firts: the parts are first, tune, " in capsys.readouterr().err


def test_a_dry_run_needs_no_gpu_and_lists_each_part_with_its_seconds(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, part in gpu.PARTS.items():
        assert f"{name}: {part.limit} s, of which {part.limit - 15} for" in lines


def test_the_parts_fit_their_limits_and_are_there():
    assert gpu.PARTS["first"].limit <= 200
    for name, part in gpu.PARTS.items():
        assert part.limit <= 250
        needed = sum(item.least or item.seconds for item in part.items)
        assert needed <= part.limit - gpu.RESERVE, f"{name}: not everything would be begun"
        assert all(gpu.available(item) for item in part.items if item.name != "probes")
    commands = [command for part in gpu.PARTS.values() for item in part.items for command in item.commands]
    names = [command[1:-1] for command in commands if command[0] == "benchmarks.layers"]
    for layer in all_layers():
        assert sum(any(name in layer.name for name in some) for some in names) == 1
    root = Path(gpu.__file__).parents[1]
    assert all((root / word.removeprefix("--ignore=")).exists() for word in gpu.TESTS)
