"""Evaluate a checkpoint on the validation images: `python launch/eval.py --help`."""

from nvcnn.program import run
from nvcnn.settings import Evaluation, parse


def main() -> int:
    asked = parse(Evaluation)
    from nvcnn.evaluate import evaluate  # takes seconds, which bad flags need not wait for

    return evaluate(asked)


if __name__ == "__main__":
    run(main)
