"""GoogLeNet: Szegedy et al. 2014, "Going Deeper with Convolutions", arXiv:1409.4842.

Names of parameters, architecture and initialisation are torchvision's, so its published weights load. These take images
normalised to [-1, 1]. torchvision's differs from the paper's: it has BatchNorm in place of biases and of local response
normalisation, 3x3 convolutions in place of the 5x5, and half the dropout before the last layer. The original nvcnn had
biases, 5x5, no normalisation, no dropout and no heads. `aux` adds the auxiliary heads, whose losses training adds with
`aux_weight`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from nvcnn.models.branches import MAX, Branches, ConvBN
from nvcnn.models.fused import activation, max_pool
from nvcnn.models.layers import Classifier, Linear


def inception(c_in: int, c1: int, reduce3: int, c3: int, reduce5: int, c5: int, pool: int) -> Branches:
    """Returns a module whose arguments are a line of the paper's table 1."""
    return Branches(c_in, [
        [("branch1", c1, 1)],
        [("branch2.0", reduce3, 1), ("branch2.1", c3, 3)],
        [("branch3.0", reduce5, 1), ("branch3.1", c5, 3)],
        [MAX, ("branch4.1", pool, 1)],
    ])  # fmt: skip


class Head(nn.Module):
    """An auxiliary head. (N, c_in, H, W) -> (N, num_classes)."""

    dropout = 0.7

    def __init__(self, c_in: int, num_classes: int):
        super().__init__()
        self.conv = ConvBN(c_in, 128, 1)
        self.fc1 = Linear(128 * 4 * 4, 1024)
        self.fc2 = Classifier(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = activation(self.conv(F.adaptive_avg_pool2d(x, 4)))
        x = F.relu(self.fc1(torch.flatten(x, 1)), inplace=True)
        return self.fc2(F.dropout(x, self.dropout, self.training))


class GoogLeNet(nn.Module):
    """(N, 3, H, W), or 4 channels of which the last is zero -> (N, num_classes).

    With `aux`, in training: a tuple of that and of the heads', the later one's first.
    """

    takes_padded_images = True
    aux_weight = 0.3
    dropout = 0.2

    def __init__(self, *, num_classes: int, aux: bool = False):
        super().__init__()
        self.conv1 = ConvBN(3, 64, 7, stride=2, padding=3)
        self.conv2 = ConvBN(64, 64, 1)
        self.conv3 = ConvBN(64, 192, 3)
        self.inception3a = inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = inception(256, 128, 128, 192, 32, 96, 64)
        self.inception4a = inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = inception(528, 256, 160, 320, 32, 128, 128)
        self.inception5a = inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = inception(832, 384, 192, 384, 48, 128, 128)
        self.aux1 = Head(512, num_classes) if aux else None
        self.aux2 = Head(528, num_classes) if aux else None
        self.fc = Classifier(1024, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = max_pool(self.conv1(x), 3, stride=2, ceil_mode=True)
        x = max_pool(self.conv3(self.conv2(x)), 3, stride=2, ceil_mode=True)
        x = max_pool(self.inception3b(self.inception3a(x)), 3, stride=2, ceil_mode=True)
        x = after_4a = self.inception4a(x)
        x = after_4d = self.inception4d(self.inception4c(self.inception4b(x)))
        x = max_pool(self.inception4e(x), 2, stride=2, ceil_mode=True)
        x = self.inception5b(self.inception5a(x))
        x = F.dropout(kernels.global_average(activation(x)), self.dropout, self.training)
        if self.training and self.aux1 is not None and self.aux2 is not None:
            return self.fc(x), self.aux2(after_4d), self.aux1(after_4a)
        return self.fc(x)
