"""Write a checkpoint's weights for other programs: `python launch/export.py --help`."""

from nvcnn.program import run
from nvcnn.settings import Export, parse


def main() -> int:
    asked = parse(Export)
    from nvcnn.export import export  # takes seconds, which bad flags need not wait for

    return export(asked)


if __name__ == "__main__":
    run(main)
