"""ResNet: He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385.

And ResNeXt, whose 3x3 convolutions have groups: Xie et al. 2016, "Aggregated Residual Transformations for Deep Neural
Networks", arXiv:1611.05431.

Names of parameters, architecture and initialisation are torchvision's, so its published weights load. The bottleneck is
v1.5, with the stride in the 3x3 convolution; `v1` puts it into the first 1x1, as the paper has it.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import kernels
from nvcnn.models.fused import PendingAdd, PendingConv, Unnormalized, activation, conv_bn, max_pool
from nvcnn.models.layers import BatchNorm2d, Classifier, Conv2d

DEPTHS = {  # blocks in each of the four stages
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def conv(c_in: int, c_out: int, size: int, stride: int = 1, groups: int = 1) -> Conv2d:
    return Conv2d(c_in, c_out, size, stride, padding=size // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection. (N, c_in, H, W) -> (N, width, H / stride, W / stride)."""

    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int):
        super().__init__()
        self.conv1 = conv(c_in, width, 3, stride)
        self.bn1 = BatchNorm2d(width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = BatchNorm2d(width)
        self.downsample = downsample(c_in, width, stride)
        self.stride = stride

    def forward(self, x: Tensor | PendingAdd) -> PendingAdd:
        y = conv_bn(x, self.conv1, self.bn1, self.stride)
        y = conv_bn(y, self.conv2, self.bn2)
        return PendingAdd(y, skip(x, self.downsample))


class Bottleneck(nn.Module):
    """1x1 down to `width`, 3x3, 1x1 up to 4 * width, and a skip connection. (N, c_in, H, W) -> (N, 4 * width, ...).

    `group_width`: channels of a group of the 3x3 where the width is 64; in deeper stages it grows with the width.
    """

    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int, v1: bool = False, groups: int = 1, group_width: int = 64):
        super().__init__()
        c_out, inner = self.expansion * width, width * group_width // 64 * groups
        self.conv1 = conv(c_in, inner, 1, stride if v1 else 1)
        self.bn1 = BatchNorm2d(inner)
        self.conv2 = conv(inner, inner, 3, 1 if v1 else stride, groups)
        self.bn2 = BatchNorm2d(inner)
        self.conv3 = conv(inner, c_out, 1)
        self.bn3 = BatchNorm2d(c_out)
        self.downsample = downsample(c_in, c_out, stride)
        self.stride = stride

    def forward(self, x: Tensor | PendingAdd) -> PendingAdd:
        y = conv_bn(x, self.conv1, self.bn1, self.stride)
        y = conv_bn(y, self.conv2, self.bn2)
        y = conv_bn(y, self.conv3, self.bn3)
        return PendingAdd(y, skip(x, self.downsample))


def downsample(c_in: int, c_out: int, stride: int) -> nn.Module:
    """Returns what a skip connection passes through: nothing, or where the shape changes a 1x1 with BatchNorm."""
    if stride == 1 and c_in == c_out:
        return nn.Identity()
    return nn.Sequential(conv(c_in, c_out, 1, stride), BatchNorm2d(c_out))


def skip(x: Tensor | PendingAdd, downsample: nn.Module) -> Tensor | Unnormalized | PendingConv:
    """Returns what the skip connection adds."""
    if isinstance(downsample, nn.Identity):
        return activation(x)
    convolution, bn = downsample.children()
    assert isinstance(convolution, Conv2d)
    assert isinstance(bn, BatchNorm2d)
    return conv_bn(x, convolution, bn)


class ResNet(nn.Module):
    """(N, 3, H, W), or 4 channels of which the last is zero -> (N, num_classes).

    `depths`: blocks in each of the four stages; `options` go to every block. `zero_gamma`: the last BatchNorm of each
    block begins with gamma 0, so that the block hands on what it gets (Goyal et al. 2017, arXiv:1706.02677).
    """

    takes_padded_images = True

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        *,
        num_classes: int,
        zero_gamma: bool = False,
        **options: Any,
    ):
        super().__init__()
        self.conv1 = conv(3, 64, 7, stride=2)
        self.bn1 = BatchNorm2d(64)

        def stage(c_in: int, width: int, depth: int, stride: int) -> nn.Sequential:
            first = block(c_in, width, stride, **options)
            return nn.Sequential(first, *(block(e * width, width, 1, **options) for _ in range(depth - 1)))

        e = block.expansion
        self.layer1 = stage(64, 64, depths[0], stride=1)
        self.layer2 = stage(e * 64, 128, depths[1], stride=2)
        self.layer3 = stage(e * 128, 256, depths[2], stride=2)
        self.layer4 = stage(e * 256, 512, depths[3], stride=2)
        self.fc = Classifier(e * 512, num_classes)

        for module in self.modules():
            if isinstance(module, Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_gamma and isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight)

    def forward(self, x: Tensor) -> Tensor:
        x = max_pool(conv_bn(x, self.conv1, self.bn1), 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(kernels.global_average(activation(x)))


def resnet(*, depth: int, num_classes: int, resnet_v1: bool = False, **options: Any) -> ResNet:
    """Returns the ResNet of that depth; with `groups` and `group_width` the ResNeXt."""
    block = BasicBlock if depth < 50 else Bottleneck
    return ResNet(block, DEPTHS[depth], num_classes=num_classes, **options, **({"v1": True} if resnet_v1 else {}))
