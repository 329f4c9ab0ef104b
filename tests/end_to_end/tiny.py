"""Runs launch/train.py with one model more, so small that Triton's interpreter trains it in seconds.

Every fused layer is in it once. Prints the Triton kernels that ran.
"""

from torch import Tensor, nn
from triton.runtime import interpreter

import kernels
from nvcnn.models import MODELS, Model
from nvcnn.models.fused import PendingAdd, activation, conv_bn, max_pool
from nvcnn.models.layers import BatchNorm2d, Classifier, Conv2d
from nvcnn.program import run
from nvcnn.settings import Settings, parse
from nvcnn.train import train


class Tiny(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1, self.bn1 = Conv2d(3, 8, 4, stride=4, bias=False), BatchNorm2d(8)
        self.conv2, self.bn2 = Conv2d(8, 16, 3, padding=1, bias=False), BatchNorm2d(16)
        self.skip, self.bn3 = Conv2d(8, 16, 1, bias=False), BatchNorm2d(16)
        self.fc = Classifier(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = max_pool(conv_bn(x, self.conv1, self.bn1), kernel_size=3, stride=2, padding=1)
        added = PendingAdd(conv_bn(x, self.conv2, self.bn2), conv_bn(x, self.skip, self.bn3))
        return self.fc(kernels.global_average(activation(added)))


MODELS["tiny"] = Model(Tiny, 28, lambda total_batch: 0.1)
launched: set[str] = set()


def main() -> int:
    call = interpreter.GridExecutor.__call__

    def noted(executor, *arguments, **options):
        launched.add(f"{executor.fn.__module__}.{executor.fn.__name__}".removeprefix("kernels."))
        return call(executor, *arguments, **options)

    interpreter.GridExecutor.__call__ = noted
    code = train(parse(Settings))
    print("launched:", *sorted(launched))
    return code


if __name__ == "__main__":
    run(main)
