"""Inception v4: Szegedy et al. 2016, "Inception-v4, Inception-ResNet and the Impact of Residual Connections ...".

arXiv:1602.07261. Names of parameters, architecture and initialisation are timm's, so its published weights load. These
take images normalised to [-1, 1]. Dropout is the paper's, which keeps 0.8; timm has none by default.
"""

import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from nvcnn.models.branches import AVERAGE_INSIDE, HALVE, Branches, ConvBN
from nvcnn.models.fused import activation
from nvcnn.models.layers import Classifier


def stem() -> list[nn.Module]:
    return [
        ConvBN(3, 32, 3, stride=2),
        ConvBN(32, 32, 3, padding=0),
        ConvBN(32, 64, 3),
        Branches(64, [[HALVE], [("conv", 96, 3, 2)]]),
        Branches(160, [
            [("branch0.0", 64, 1), ("branch0.1", 96, 3, 1, 0)],
            [("branch1.0", 64, 1), ("branch1.1", 64, (1, 7)), ("branch1.2", 64, (7, 1)), ("branch1.3", 96, 3, 1, 0)],
        ]),
        Branches(192, [[("conv", 192, 3, 2)], [HALVE]]),
    ]  # fmt: skip


def inception_a() -> Branches:
    return Branches(384, [
        [("branch0", 96, 1)],
        [("branch1.0", 64, 1), ("branch1.1", 96, 3)],
        [("branch2.0", 64, 1), ("branch2.1", 96, 3), ("branch2.2", 96, 3)],
        [AVERAGE_INSIDE, ("branch3.1", 96, 1)],
    ])  # fmt: skip


def reduction_a() -> Branches:
    return Branches(384, [
        [("branch0", 384, 3, 2)],
        [("branch1.0", 192, 1), ("branch1.1", 224, 3), ("branch1.2", 256, 3, 2)],
        [HALVE],
    ])  # fmt: skip


def inception_b() -> Branches:
    return Branches(1024, [
        [("branch0", 384, 1)],
        [("branch1.0", 192, 1), ("branch1.1", 224, (1, 7)), ("branch1.2", 256, (7, 1))],
        [
            ("branch2.0", 192, 1),
            ("branch2.1", 192, (7, 1)), ("branch2.2", 224, (1, 7)),
            ("branch2.3", 224, (7, 1)), ("branch2.4", 256, (1, 7)),
        ],
        [AVERAGE_INSIDE, ("branch3.1", 128, 1)],
    ])  # fmt: skip


def reduction_b() -> Branches:
    return Branches(1024, [
        [("branch0.0", 192, 1), ("branch0.1", 192, 3, 2)],
        [("branch1.0", 256, 1), ("branch1.1", 256, (1, 7)), ("branch1.2", 320, (7, 1)), ("branch1.3", 320, 3, 2)],
        [HALVE],
    ])  # fmt: skip


def inception_c() -> Branches:
    return Branches(1536, [
        [("branch0", 256, 1)],
        [("branch1_0", 384, 1), [("branch1_1a", 256, (1, 3)), ("branch1_1b", 256, (3, 1))]],
        [
            ("branch2_0", 384, 1), ("branch2_1", 448, (3, 1)), ("branch2_2", 512, (1, 3)),
            [("branch2_3a", 256, (1, 3)), ("branch2_3b", 256, (3, 1))],
        ],
        [AVERAGE_INSIDE, ("branch3.1", 256, 1)],
    ])  # fmt: skip


class Inception4(nn.Module):
    """(N, 3, H, W), or 4 channels of which the last is zero -> (N, num_classes). H and W are at least 75."""

    takes_padded_images = True
    dropout = 0.2

    def __init__(self, *, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(
            *stem(),
            *(inception_a() for _ in range(4)),
            reduction_a(),
            *(inception_b() for _ in range(7)),
            reduction_b(),
            *(inception_c() for _ in range(3)),
        )
        self.last_linear = Classifier(1536, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = kernels.global_average(activation(self.features(x)))
        return self.last_linear(F.dropout(x, self.dropout, self.training))
