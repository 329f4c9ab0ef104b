"""Train a convolutional network: `python launch/train.py --help`."""

import sys

try:
    from nvcnn.program import run
except ModuleNotFoundError:
    how = "activate its environment, or `pip install -e .` in the checkout"
    sys.exit(f"train.py: {sys.executable} has no nvcnn: {how}")
from nvcnn.settings import Settings, parse


def main() -> int:
    settings = parse(Settings)
    from nvcnn.train import train  # takes seconds, which bad flags need not wait for

    return train(settings)


if __name__ == "__main__":
    run(main)
