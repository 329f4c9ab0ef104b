"""Train a convolutional network: `python launch/train.py --help`."""

from nvcnn.program import run
from nvcnn.settings import parse
from nvcnn.train import train

if __name__ == "__main__":
    run(lambda: train(parse()))
