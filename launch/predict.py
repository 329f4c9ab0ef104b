"""Say what pictures show, by a trained network: `python launch/predict.py --help`."""

import sys

try:
    from nvcnn.program import run
except ModuleNotFoundError:
    how = "activate its environment, or `pip install -e .` in the checkout"
    sys.exit(f"predict.py: {sys.executable} has no nvcnn: {how}")
from nvcnn.settings import Prediction, parse


def main() -> int:
    asked = parse(Prediction)
    from nvcnn.predict import predict  # takes seconds, which bad flags need not wait for

    return predict(asked)


if __name__ == "__main__":
    run(main)
