"""Say what pictures show, by a trained network: `python launch/predict.py --help`."""

from nvcnn.program import run
from nvcnn.settings import Prediction, parse


def main() -> int:
    asked = parse(Prediction)
    from nvcnn.predict import predict  # takes seconds, which bad flags need not wait for

    return predict(asked)


if __name__ == "__main__":
    run(main)
