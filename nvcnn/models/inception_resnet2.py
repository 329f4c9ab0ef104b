"""Inception-ResNet v2, from the paper of Inception v4: Szegedy et al. 2016, arXiv:1602.07261.

Names of parameters, architecture and initialisation are timm's, so its published weights load. These take images
normalised to [-1, 1]. Residuals are scaled by timm's 0.17, 0.1 and 0.2, the last one by 1; the original nvcnn had 0.2,
and the paper 0.1 to 0.3. Dropout is the paper's, which keeps 0.8; timm has none by default.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from nvcnn.models.branches import AVERAGE_INSIDE, HALVE, Branches, ConvBN, Table
from nvcnn.models.fused import Operand, activation, max_pool
from nvcnn.models.layers import Classifier, Conv2d


class Residual(Branches):
    """relu(x + scale * a 1x1 convolution of the branches, `c_branches` together); ReLU is optional."""

    def __init__(self, c: int, c_branches: int, table: Table, scale: float, relu: bool = True):
        super().__init__(c, table)
        self.conv2d = Conv2d(c_branches, c, 1)
        self.scale, self.relu = scale, relu

    def forward(self, x: Operand) -> Tensor:
        x = activation(x)
        y = torch.add(x, self.conv2d(super().forward(x)), alpha=self.scale)
        return F.relu(y, inplace=True) if self.relu else y


def mixed_5b() -> Branches:
    return Branches(192, [
        [("branch0", 96, 1)],
        [("branch1.0", 48, 1), ("branch1.1", 64, 5)],
        [("branch2.0", 64, 1), ("branch2.1", 96, 3), ("branch2.2", 96, 3)],
        [AVERAGE_INSIDE, ("branch3.1", 64, 1)],
    ])  # fmt: skip


def block35() -> Residual:
    return Residual(320, 128, [
        [("branch0", 32, 1)],
        [("branch1.0", 32, 1), ("branch1.1", 32, 3)],
        [("branch2.0", 32, 1), ("branch2.1", 48, 3), ("branch2.2", 64, 3)],
    ], scale=0.17)  # fmt: skip


def mixed_6a() -> Branches:
    return Branches(320, [
        [("branch0", 384, 3, 2)],
        [("branch1.0", 256, 1), ("branch1.1", 256, 3), ("branch1.2", 384, 3, 2)],
        [HALVE],
    ])  # fmt: skip


def block17() -> Residual:
    return Residual(1088, 384, [
        [("branch0", 192, 1)],
        [("branch1.0", 128, 1), ("branch1.1", 160, (1, 7)), ("branch1.2", 192, (7, 1))],
    ], scale=0.1)  # fmt: skip


def mixed_7a() -> Branches:
    return Branches(1088, [
        [("branch0.0", 256, 1), ("branch0.1", 384, 3, 2)],
        [("branch1.0", 256, 1), ("branch1.1", 288, 3, 2)],
        [("branch2.0", 256, 1), ("branch2.1", 288, 3), ("branch2.2", 320, 3, 2)],
        [HALVE],
    ])  # fmt: skip


def block8(scale: float = 0.2, relu: bool = True) -> Residual:
    return Residual(2080, 448, [
        [("branch0", 192, 1)],
        [("branch1.0", 192, 1), ("branch1.1", 224, (1, 3)), ("branch1.2", 256, (3, 1))],
    ], scale, relu)  # fmt: skip


class InceptionResNet2(nn.Module):
    """(N, 3, H, W), or 4 channels of which the last is zero -> (N, num_classes). H and W are at least 75."""

    takes_padded_images = True
    dropout = 0.2

    def __init__(self, *, num_classes: int):
        super().__init__()
        self.conv2d_1a = ConvBN(3, 32, 3, stride=2)
        self.conv2d_2a = ConvBN(32, 32, 3, padding=0)
        self.conv2d_2b = ConvBN(32, 64, 3)
        self.conv2d_3b = ConvBN(64, 80, 1)
        self.conv2d_4a = ConvBN(80, 192, 3, padding=0)
        self.mixed_5b = mixed_5b()
        self.repeat = nn.Sequential(*(block35() for _ in range(10)))
        self.mixed_6a = mixed_6a()
        self.repeat_1 = nn.Sequential(*(block17() for _ in range(20)))
        self.mixed_7a = mixed_7a()
        self.repeat_2 = nn.Sequential(*(block8() for _ in range(9)))
        self.block8 = block8(scale=1.0, relu=False)
        self.conv2d_7b = ConvBN(2080, 1536, 1)
        self.classif = Classifier(1536, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(x)))
        x = max_pool(x, 3, stride=2)
        x = max_pool(self.conv2d_4a(self.conv2d_3b(x)), 3, stride=2)
        x = self.repeat(self.mixed_5b(x))
        x = self.repeat_1(self.mixed_6a(x))
        x = self.block8(self.repeat_2(self.mixed_7a(x)))
        x = kernels.global_average(activation(self.conv2d_7b(x)))
        return self.classif(F.dropout(x, self.dropout, self.training))
