"""A program knows who launched it, ends with its exit code and one line, and imports no more than that needs."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nvcnn.program import Launch, launched

REPOSITORY = Path(__file__).parents[2]

PROGRAM = """
import sys
from nvcnn.program import InputError, run

sys.argv[0] = "launch/train.py"

def program():
    {}

run(program)
"""

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
            {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1"},
            Launch(16, 9, 1, "srun", "SLURM_NTASKS=16"),
        ),
        ({"WORLD_SIZE": "2", "RANK": "1"}, Launch(2, 1, 0, "the environment", "WORLD_SIZE=2")),
        ({"SLURM_NTASKS": "16"}, Launch()),  # sbatch without srun is one process
    ],
)
def test_launchers(environment, expected):
    assert launched(environment) == expected


@pytest.mark.parametrize(
    ("does", "code", "says"),
    [
        ("return 3", 3, ""),
        ("raise InputError('--flag=1: must be 2')", 2, "train.py: --flag=1: must be 2\n"),
        ("raise KeyboardInterrupt", 1, "train.py: interrupted\n"),
    ],
)
def test_exit_codes(does, code, says):
    program = subprocess.run([sys.executable, "-c", PROGRAM.format(does)], capture_output=True, text=True)
    assert (program.returncode, program.stderr, program.stdout) == (code, says, "")


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


def test_what_nobody_expects_has_a_traceback():
    program = subprocess.run([sys.executable, "-c", PROGRAM.format("1 / 0")], capture_output=True, text=True)
    assert program.returncode == 1
    assert program.stderr.endswith("ZeroDivisionError: division by zero\n")


BAD = ["--flag", "--batch_size=x", "--model=resnet51", "--conv=fast"]


@pytest.mark.parametrize("flags", ["--help", "--version", *BAD])
@pytest.mark.parametrize("name", ["train", "eval"])
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
