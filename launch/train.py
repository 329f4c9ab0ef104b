"""Train a convolutional network: `python launch/train.py --help`."""

from nvcnn.program import run
from nvcnn.settings import Settings, parse


def main() -> int:
    settings = parse(Settings)
    from nvcnn.train import train  # takes seconds, which bad flags need not wait for

    return train(settings)


if __name__ == "__main__":
    run(main)
