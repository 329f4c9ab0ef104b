"""What GoogLeNet and the Inceptions are made of: chains of layers that read one tensor, and are concatenated.

    Branches(192, [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [AVERAGE, ("branch_pool", 32, 1)],
    ])

A line is a branch. A layer is its name, its channels and its kernel size, (height, width) or one number; a stride and a
padding may follow. A list of layers ends a branch that forks: they read the same tensor. A name may have dots.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nvcnn.models.fused import Operand, PendingConv, Unnormalized, activation, concatenate, conv_bn, max_pool, pooling
from nvcnn.models.layers import BatchNorm2d, Conv2d

MAX = partial(max_pool, kernel_size=3, stride=1, padding=1)
HALVE = partial(pooling, kernel_size=3, stride=2)  # into its slice, where it is a branch
AVERAGE = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1)
AVERAGE_INSIDE = partial(AVERAGE, count_include_pad=False)  # the mean of the pixels that are there

Table = list[list[Any]]


class ConvBN(nn.Module):
    """Convolution, BatchNorm and ReLU. (N, c_in, H, W) -> (N, c_out, H', W').

    Without a stride the padding keeps the size, with one there is none, unless it is given.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int | tuple[int, int], stride: int = 1, padding: int | None = None
    ):
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        same = (height // 2, width // 2) if stride == 1 else 0
        self.conv = Conv2d(c_in, c_out, (height, width), stride, same if padding is None else padding, bias=False)
        self.bn = BatchNorm2d(c_out)

    def forward(self, x: Operand) -> Unnormalized | PendingConv:
        return conv_bn(x, self.conv, self.bn)


class AverageConvBN(ConvBN):
    """Average pooling, a 1x1 convolution, BatchNorm and ReLU. (N, c_in, H, W) -> (N, c_out, H, W).

    Pooling is linear over pixels and the convolution over channels, so they commute. The convolution comes first, which
    leaves 4 to 10 times fewer channels to pool: for an image of Inception v3 in fp16 backward keeps 0.9 MB of those, in
    place of 4.0 MB of pooled inputs.
    """

    def __init__(self, c_in: int, c_out: int, average: Callable[[Tensor], Tensor]):
        super().__init__(c_in, c_out, 1)
        self.average = average

    def forward(self, x: Operand) -> Unnormalized:
        return Unnormalized(self.average(self.conv(activation(x))), self.bn)


class Branches(nn.Module):
    """The branches of a table, concatenated. (N, c_in, H, W) -> (N, sum of the branches' channels, H', W')."""

    def __init__(self, c_in: int, table: Table):
        super().__init__()
        self.branches = [self.branch(c_in, line) for line in table]

    def branch(self, c: int, line: list[Any]) -> list[Any]:
        """Returns what a branch calls, in turn. Registers its layers, of which the first reads c channels."""
        steps: list[Any] = []
        for step in line:
            if isinstance(step, tuple):
                name, c_out, *shape = step
                pools = steps and steps[-1] in (AVERAGE, AVERAGE_INSIDE)
                steps.append(AverageConvBN(c, c_out, steps.pop()) if pools else ConvBN(c, c_out, *shape))
                self.register(name, steps[-1])
                c = c_out
            elif isinstance(step, list):
                steps.append([self.branch(c, [layer])[0] for layer in step])
            else:
                steps.append(step)
        return steps

    def register(self, name: str, layer: nn.Module) -> None:
        """Names a submodule; a dot in the name makes a module around it."""
        *path, last = name.split(".")
        parent: nn.Module = self
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, layer)

    def forward(self, x: Operand) -> Tensor:
        ends: list[Operand] = []
        for branch in self.branches:
            y: Any = x
            for step in branch:
                y = [layer(y) for layer in step] if isinstance(step, list) else step(y)
            ends += y if isinstance(y, list) else [y]
        return concatenate(ends)
