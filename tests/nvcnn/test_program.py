"""A program knows who launched it, ends with its exit code and one line, and imports no more than that needs."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from nvcnn.program import InputError, Launch, launched

REPOSITORY = Path(__file__).parents[2]

PROGRAM = """
import os
import sys
from nvcnn.program import InputError, launched, run

sys.argv[0] = "launch/train.py"

def program():
    {}

run(program)
"""

# Makes it the second of two ranks, where rank 0 has no error.
SECOND = "os.environ |= {'RANK': '1', 'WORLD_SIZE': '2'}; import nvcnn.program; nvcnn.program.wait_for_rank_0 = int"

# Runs a program of launch/, and exits with 9 if what must not be imported was.
LIGHT = """
import os, runpy, sys

def end(code, exit=os._exit):
    exit(9 if {"torch", "numpy", "triton"} & sys.modules.keys() else code)

os._exit = end
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as error:
    sys.stdout.flush()
    end(error.code or 0)
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            Launch(4, 3, 1, "Open MPI", "OMPI_COMM_WORLD_SIZE=4"),
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, Launch(2, 1, 0, "MPICH or Intel MPI", "PMI_SIZE=2")),
        (
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "5"},
            Launch(8, 5, 5, "torchrun", "WORLD_SIZE=8"),
        ),
        (
            {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"},
            Launch(16, 9, 1, "srun", "SLURM_STEP_NUM_TASKS=16"),
        ),
        (  # an interactive step
            {"SLURM_STEP_ID": "9", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
            Launch(1, 0, 0, "srun", "SLURM_STEP_NUM_TASKS=1"),
        ),
        ({"WORLD_SIZE": "2", "RANK": "1"}, Launch(2, 1, 0, "the environment", "WORLD_SIZE=2")),
        ({"SLURM_NTASKS": "16"}, Launch()),  # sbatch without srun is one process
    ],
)
def test_launchers(environment, expected):
    assert launched(environment) == expected


# Waits where no handler of Python's is called, as in DALI.
STUCK = """
import ctypes, sys
from nvcnn import program

sys.argv[0], program.PATIENCE, program.AGAIN = "launch/train.py", float(sys.argv[1]), 0.1
mutex, lock = (ctypes.c_char * 64)(), ctypes.CDLL(None).pthread_mutex_lock

def stuck():
    with program.caught() as signals, signals.waiting():
        lock(mutex)
        print("waits", flush=True)
        lock(mutex)

program.run(stuck)
"""


@pytest.mark.parametrize(
    ("number", "patience", "times", "says"),
    [
        *((n, "0.1", 1, "a signal while it waited for input") for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)),
        (signal.SIGTERM, "1000", 60, "a second signal"),
    ],
)
def test_a_program_that_waits_in_a_library_obeys_signals(number, patience, times, says):
    command = [sys.executable, "-c", STUCK, patience]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        assert program.stdout.readline() == "waits\n"
        for _ in range(times):
            program.send_signal(number)  # no more, once it has ended
            with suppress(subprocess.TimeoutExpired):
                program.wait(30 / times)
        program.kill()
        assert (program.wait(), program.stderr.read()) == (1, f"train.py: ended by {says}, without saving\n")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=: must be a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: must be a number"),
        ({"WORLD_SIZE": "0"}, "RANK=1: must be below WORLD_SIZE=0"),
        ({"RANK": "2"}, "RANK=2: must be below WORLD_SIZE=2"),
        ({"RANK": "-1"}, "RANK=-1: must be a number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK=: must be a number"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK=: must be a number, as Open MPI sets it"),
    ],
)
def test_what_no_launcher_sets(wrong, message):
    with pytest.raises(InputError, match=message):
        launched({"WORLD_SIZE": "2", "RANK": "1"} | wrong)


# Its collective fails since another rank has gone, and the watch is about to say which.
INNOCENT = """import threading, nvcnn.program as p
    p.here.waits, p.leaving = True, [str]
    threading.Timer(0.3, os._exit, [7]).start()
    1 / 0"""


@pytest.mark.parametrize(
    ("does", "code", "says"),
    [
        ("return 3", 3, ""),
        (INNOCENT, 7, ""),
        ("raise InputError('--flag=1: must be 2')", 2, "train.py: --flag=1: must be 2\n"),
        (f"{SECOND}; raise InputError('--flag=1')", 2, f"train.py: rank 1 on {socket.gethostname()}: --flag=1\n"),
        (r"raise InputError('a\n\rb\x1b[2J\x9bc')", 2, "train.py: a\\n\\rb\\x1b[2J\\x9bc\n"),
        ("raise PermissionError(13, 'Permission denied', 'a/b')", 2, "train.py: a/b: Permission denied\n"),
        ("raise ModuleNotFoundError(name='torch')", 1, f"train.py: {sys.executable} has no torch: activate its env"),
        ("raise KeyboardInterrupt", 1, "train.py: interrupted\n"),
        ("os.environ |= {'RANK': '0', 'WORLD_SIZE': ''}; launched()", 2, "train.py: WORLD_SIZE=: must be a number"),
    ],
)
def test_exit_codes(does, code, says):
    program = subprocess.run([sys.executable, "-c", PROGRAM.format(does)], capture_output=True, text=True)
    assert (program.returncode, program.stdout) == (code, "")
    assert program.stderr.startswith(says)
    assert program.stderr.count("\n") == (1 if says else 0)


def piped(does: str, **streams) -> tuple[int, bytes]:
    """Runs a program whose output nobody reads; returns its exit code, and what it says on standard error."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as unread:
        streams = {"stdout": unread, "stderr": subprocess.PIPE} | streams
        program = subprocess.run([sys.executable, "-c", PROGRAM.format(does)], **streams)
    return program.returncode, program.stderr


def test_a_reader_that_has_gone_ends_no_program():
    many = "for i in range(9999): print(i, flush=i % 2)"
    assert piped(f"{many}\n    return 3") == (3, b"")
    assert piped(f"{many}\n    return 0") == (0, b"")
    assert piped("raise InputError('--flag')") == (2, b"train.py: --flag\n")
    assert piped("1 / 0", stderr=subprocess.STDOUT)[0] == 1
    with open("/dev/full", "w") as full:
        code, said = piped(f"{many}\n    return 0", stdout=full)
    assert code == 1
    assert said == b"train.py: done, but not all of its output could be written (No space left on device)\n"
    code, said = piped("print(1)\n    return 0", stdout=None, preexec_fn=lambda: os.close(1))
    assert (code, said) == (0, b"")


def test_ctrl_c_where_a_shell_has_it_ignored():
    """So it has what a script starts in the background."""
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    command = [sys.executable, "-c", ignored + PROGRAM.format("signal.raise_signal(signal.SIGINT); return 0")]
    program = subprocess.run(command, capture_output=True, text=True)
    assert (program.returncode, program.stderr) == (1, "train.py: interrupted\n")


@pytest.mark.parametrize("locale", [{}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_any_name_can_be_said_in_any_locale(locale):
    """What is not ASCII, or not even UTF-8, is text of its own: the same in all locales, in files that are written."""
    does = "name = os.listdir(sys.argv[1])[0]; print(name, ascii(name)); raise InputError(name)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LC_")}
    environment |= {"LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict"} | locale
    with tempfile.TemporaryDirectory() as directory:
        open(os.fsencode(directory) + b"/caf\xe9-\xc3\xbc", "w").close()
        command = [sys.executable, "-c", "import os" + PROGRAM.format(does), directory]
        program = subprocess.run(command, capture_output=True, text=True, env=environment)
    name = r"caf\udce9-\xfc"
    assert (program.returncode, program.stdout) == (2, f"{name} '{name}'\n")
    assert program.stderr == f"train.py: {name}\n"


@pytest.mark.parametrize("program", sorted((REPOSITORY / "launch").glob("*.py")), ids=lambda path: path.name)
def test_a_checkout_that_is_not_installed(program, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", program, "--help"]  # -S: without site-packages
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    what = f"{program.name}: {sys.executable} has no nvcnn: "
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"{what}activate its environment, or `pip install -e .` in the checkout\n"


@pytest.mark.parametrize(
    ("does", "ends"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero\n"),
        ("[0] * 2**60", "MemoryError\nOut of memory: free some, or give a lower --batch_size\n"),
    ],
)
def test_what_nobody_expects_has_a_traceback(does, ends):
    program = subprocess.run([sys.executable, "-c", PROGRAM.format(does)], capture_output=True, text=True)
    assert program.returncode == 1
    assert program.stderr.startswith("Traceback")
    assert program.stderr.endswith(ends)


BAD = ["--flag", "--batch_size=x", "--model=resnet51", "--conv=fast"]


@pytest.mark.parametrize("flags", ["--help", "--version", *BAD])
@pytest.mark.parametrize("name", ["train", "eval", "predict"])
def test_flags_are_read_without_torch(name, flags):
    arguments = [flags, "--data_dir=d", "--log_dir=l"] + ["--model=lenet"] * (not flags.startswith("--model"))
    program = subprocess.run(
        [sys.executable, "-c", LIGHT, f"launch/{name}.py", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    answer = program.stderr if flags in BAD else program.stdout
    assert program.returncode == (2 if flags in BAD else 0), answer
    assert {"--help": "usage: ", "--version": "nvcnn "}.get(flags, f"{name}.py: ") in answer
