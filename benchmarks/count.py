"""Counts how large the project is: lines of code, without blank lines, comments and docstrings.

python -m benchmarks.count [DIRECTORY ...]    lists the files of each DIRECTORY as well
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

PARTS = {"product": ("kernels", "nvcnn", "launch", "setup.py"), "benchmarks": ("benchmarks",), "tests": ("tests",)}
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(source: str) -> int:
    """Returns how many lines hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(lines)


def files_of(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def main() -> None:
    root = Path(__file__).parent.parent
    for name in sys.argv[1:]:
        for file in files_of(Path(name)):
            print(f"{code_lines(file.read_text()):6}  {file}")
    for part, names in PARTS.items():
        files = [file for name in names for file in files_of(root / name)]
        print(f"{sum(code_lines(file.read_text()) for file in files):6}  {part}, {len(files)} files")


if __name__ == "__main__":
    main()
