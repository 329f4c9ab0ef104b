"""Evaluate a checkpoint on the validation images: `python launch/eval.py --help`."""

import sys

try:
    from nvcnn.program import run
except ModuleNotFoundError:
    how = "activate its environment, or `pip install -e .` in the checkout"
    sys.exit(f"eval.py: {sys.executable} has no nvcnn: {how}")
from nvcnn.settings import Evaluation, parse


def main() -> int:
    asked = parse(Evaluation)
    from nvcnn.evaluate import evaluate  # takes seconds, which bad flags need not wait for

    return evaluate(asked)


if __name__ == "__main__":
    run(main)
