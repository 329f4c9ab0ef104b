"""Reading never imports writing, and writing imports nothing that is slow to import."""

import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
SLOW = {"torch", "triton", "kernels", "nvidia", "numpy", "PIL", "scipy"}


def imported(path: Path) -> set[str]:
    """Returns the modules that a file names in its imports, wherever they stand."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_reading_never_imports_writing():
    for path in (ROOT / "nvcnn" / "data").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith("nvcnn.prepare")], path


def test_writing_imports_no_reader():
    readers = tuple(f"nvcnn.data.{name}" for name in ("backend", "batch", "dali", "pillow_workers", "synthetic"))
    for path in (ROOT / "nvcnn" / "prepare").glob("*.py"):
        assert not [name for name in imported(path) if name.startswith(("kernels", "torch", "nvidia", *readers))], path


def child(code: str, *arguments: object) -> list[str]:
    """Runs code in a process of its own. Returns the slow packages that it has imported."""
    code += f"\nprint('', *sorted({SLOW} & {{name.split('.')[0] for name in sys.modules}}), sep='\\n')"
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.rpartition("\n\n")[2].split()


PARSE = """
import contextlib
from nvcnn.program import InputError
from nvcnn.prepare.flags import parse
for arguments in (["--help"], ["imagenet", "--help"], ["imagenet", "--wrong"], []):
    with contextlib.suppress(SystemExit, InputError):
        parse(arguments)
"""


def test_flags_are_read_before_anything_slow_is_imported():
    assert child(PARSE) == []


def test_the_program_imports_nothing_slow_by_itself():
    assert child("import runpy\nrunpy.run_path('launch/prepare.py')") == []


INTERRUPTED = """
import runpy, sys
class Finder:
    def find_spec(name, *_):
        if name == "nvcnn.prepare.flags":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder)
runpy.run_path("launch/prepare.py", run_name="__main__")
"""


def test_ctrl_c_while_it_imports_is_one_line():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (1, "prepare.py: interrupted\n")


def test_preparing_imports_pillow_alone(folders, tmp_path):
    code = "from nvcnn.prepare.flags import parse, prepare\nprepare(parse(sys.argv[1:]))"
    assert child(code, "folder", f"--train={folders[0]}", f"--out={tmp_path}/out", "--shards=2,1") == ["PIL"]
