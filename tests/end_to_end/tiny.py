"""launch/train.py with one model more: a network so small that Triton's interpreter trains it in seconds."""

from torch import nn

from nvcnn.models import MODELS, Model
from nvcnn.models.layers import BatchNorm2d, Classifier, Conv2d
from nvcnn.program import run
from nvcnn.settings import parse
from nvcnn.train import train


def tiny(num_classes: int) -> nn.Module:
    return nn.Sequential(
        *(Conv2d(3, 8, 3, stride=2, bias=False), BatchNorm2d(8), nn.ReLU()),
        *(Conv2d(8, 16, 3, stride=2, bias=False), BatchNorm2d(16), nn.ReLU()),
        *(nn.AvgPool2d((1, 6)), nn.Flatten(), Classifier(96, num_classes)),
    )


MODELS["tiny"] = Model(tiny, 28, lambda total_batch: 0.1)

if __name__ == "__main__":
    run(lambda: train(parse()))
