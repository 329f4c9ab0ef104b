"""Inception v3: Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision", arXiv:1512.00567.

Names of parameters, architecture and initialisation are torchvision's, so its published weights load. These take images
normalised to [-1, 1]. `aux` adds the auxiliary head, whose loss training adds with `aux_weight`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from nvcnn.models.branches import AVERAGE, HALVE, Branches, ConvBN
from nvcnn.models.fused import activation, max_pool
from nvcnn.models.layers import Classifier
from nvcnn.program import InputError


def inception_a(c_in: int, pool: int) -> Branches:
    return Branches(c_in, [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        [AVERAGE, ("branch_pool", pool, 1)],
    ])  # fmt: skip


def inception_b(c_in: int) -> Branches:
    return Branches(c_in, [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
        [HALVE],
    ])  # fmt: skip


def inception_c(c_in: int, c7: int) -> Branches:
    return Branches(c_in, [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", c7, 1), ("branch7x7_2", c7, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [
            ("branch7x7dbl_1", c7, 1),
            ("branch7x7dbl_2", c7, (7, 1)), ("branch7x7dbl_3", c7, (1, 7)),
            ("branch7x7dbl_4", c7, (7, 1)), ("branch7x7dbl_5", 192, (1, 7)),
        ],
        [AVERAGE, ("branch_pool", 192, 1)],
    ])  # fmt: skip


def inception_d(c_in: int) -> Branches:
    return Branches(c_in, [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2),
        ],
        [HALVE],
    ])  # fmt: skip


def inception_e(c_in: int) -> Branches:
    return Branches(c_in, [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
        [
            ("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
            [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
        ],
        [AVERAGE, ("branch_pool", 192, 1)],
    ])  # fmt: skip


class Head(nn.Module):
    """The auxiliary head. (N, c_in, 17, 17) -> (N, num_classes)."""

    def __init__(self, c_in: int, num_classes: int):
        super().__init__()
        self.conv0 = ConvBN(c_in, 128, 1)
        self.conv1 = ConvBN(128, 768, 5, padding=0)
        self.fc = Classifier(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 17:
            raise InputError(
                "--aux: the head of --model=inception3 needs images of 299 and more: give no smaller size, or no --aux"
            )
        x = self.conv1(self.conv0(F.avg_pool2d(x, 5, stride=3)))
        return self.fc(kernels.global_average(activation(x)))


class Inception3(nn.Module):
    """(N, 3, H, W), or 4 channels of which the last is zero -> (N, num_classes).

    With `aux`, in training: a tuple of that and of the head's. H and W are at least 75, with the head 299.
    """

    takes_padded_images = True
    aux_weight = 0.4
    dropout = 0.5

    def __init__(self, *, num_classes: int, aux: bool = False):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3, padding=0)
        self.Mixed_5b = inception_a(192, pool=32)
        self.Mixed_5c = inception_a(256, pool=64)
        self.Mixed_5d = inception_a(288, pool=64)
        self.Mixed_6a = inception_b(288)
        self.Mixed_6b = inception_c(768, c7=128)
        self.Mixed_6c = inception_c(768, c7=160)
        self.Mixed_6d = inception_c(768, c7=160)
        self.Mixed_6e = inception_c(768, c7=192)
        self.AuxLogits = Head(768, num_classes) if aux else None
        self.Mixed_7a = inception_d(768)
        self.Mixed_7b = inception_e(1280)
        self.Mixed_7c = inception_e(2048)
        self.fc = Classifier(2048, num_classes)

        # torchvision also asks for 0.01 in the head's second convolution, where its own loop does not find it.
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.001 if name == "AuxLogits.fc" else 0.1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = max_pool(x, 3, stride=2)
        x = max_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        heads = [self.AuxLogits(x)] if self.AuxLogits is not None and self.training else []
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        x = F.dropout(kernels.global_average(activation(x)), self.dropout, self.training)
        return (self.fc(x), *heads) if heads else self.fc(x)
