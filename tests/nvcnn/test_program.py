"""How a program ends: exit code and what it prints."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from nvcnn.errors import InputError
from nvcnn.program import run

sys.argv[0] = "launch/train.py"

def program():
    {}

run(program)
"""


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


def test_what_nobody_expects_has_a_traceback():
    program = subprocess.run([sys.executable, "-c", PROGRAM.format("1 / 0")], capture_output=True, text=True)
    assert program.returncode == 1
    assert program.stderr.endswith("ZeroDivisionError: division by zero\n")
