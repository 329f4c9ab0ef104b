"""Runs a benchmark: python -m benchmarks NAME [ARGUMENT ...]; without NAME it lists them."""

import ast
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def programs() -> dict[str, str]:
    """Returns the first line of the docstring of each module that can be run, by the module's name."""
    found = {}
    for file in sorted(FOLDER.glob("*.py")):
        if '__name__ == "__main__"' in (source := file.read_text()) and file != Path(__file__):
            found[file.stem] = source
    found |= {file.parent.name: file.with_name("__init__.py").read_text() for file in FOLDER.glob("*/__main__.py")}
    return {name: (ast.get_docstring(ast.parse(source)) or "").split("\n")[0] for name, source in found.items()}


def main() -> None:
    found = programs()
    if len(sys.argv) > 1 and sys.argv[1] in found:
        name = sys.argv[1]
        del sys.argv[1]
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
        return
    print("python -m benchmarks NAME [ARGUMENT ...]")
    print(*(f"  {name:17}  {about}" for name, about in found.items()), sep="\n")
    sys.exit(2 if len(sys.argv) > 1 else 0)


if __name__ == "__main__":
    main()
