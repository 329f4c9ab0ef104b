"""Write a checkpoint's weights for other programs: `python launch/export.py --help`."""

import sys

try:
    from nvcnn.program import run
except ModuleNotFoundError:
    how = "activate its environment, or `pip install -e .` in the checkout"
    sys.exit(f"export.py: {sys.executable} has no nvcnn: {how}")
from nvcnn.settings import Export, parse


def main() -> int:
    asked = parse(Export)
    from nvcnn.export import export  # takes seconds, which bad flags need not wait for

    return export(asked)


if __name__ == "__main__":
    run(main)
