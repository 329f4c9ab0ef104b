"""Times ResNet-50's blocks, forward and backward, against torchvision's.

Ours run fused, and on a GPU also on materialized operands, by our kernels and by cuDNN.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import benchmarks.peers  # noqa: F401 (makes torchvision importable)
from benchmarks.layers import OURS, Layer, comparison, device_and_batch, differentiated, images
from nvcnn.models.fused import activation
from nvcnn.models.layers import Conv2d, cast_matrices
from nvcnn.models.resnet import Bottleneck

# Each block has its c_in, width, stride, and H (= W) of the input.
BLOCKS = {
    "layer1.0": (64, 64, 1, 56),
    "layer1.1": (256, 64, 1, 56),
    "layer2.0": (256, 128, 2, 56),
    "layer2.1": (512, 128, 1, 28),
    "layer3.0": (512, 256, 2, 28),
    "layer3.1": (1024, 256, 1, 14),
    "layer4.0": (1024, 512, 2, 14),
    "layer4.1": (2048, 512, 1, 7),
}


class Block(nn.Module):
    """Runs a bottleneck block and writes its output to memory, which in the network the next block does."""

    def __init__(self, c_in: int, width: int, stride: int, algorithm: str):
        super().__init__()
        torch.manual_seed(0)
        self.block = prepared(Bottleneck(c_in, width, stride))
        for module in self.modules():
            if isinstance(module, Conv2d):
                module.algorithm = algorithm

    def forward(self, x: Tensor) -> Tensor:
        return activation(self.block(x))


def plain(c_in: int, width: int, stride: int) -> nn.Module:
    """Returns torchvision's block with the same weights."""
    from torchvision.models import resnet

    norm = partial(nn.BatchNorm2d, eps=1e-4)
    same = Block(c_in, width, stride, "torch").block
    down = None
    if stride > 1 or c_in != 4 * width:
        down = nn.Sequential(resnet.conv1x1(c_in, 4 * width, stride), norm(4 * width))
    block = resnet.Bottleneck(c_in, width, stride, down, norm_layer=norm)
    block.load_state_dict(same.state_dict())
    return prepared(block)


def prepared(block: Any) -> Any:
    cast_matrices(block, device_and_batch()[1])
    return block.to(memory_format=torch.channels_last)


def block_layer(name: str, c_in: int, width: int, stride: int, h: int) -> Layer:
    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
        return (images(c_in, h, h, device, dtype),)

    shape = c_in, width, stride
    contenders = {OURS: partial(differentiated, partial(Block, *shape, "triton"))}
    if torch.cuda.is_available():
        for other in ("triton-materialized", "triton-gram", "cudnn"):
            contenders[f"nvcnn --conv={other}"] = partial(differentiated, partial(Block, *shape, other))
    contenders["torchvision"] = partial(differentiated, partial(plain, *shape))
    return Layer(f"bottleneck {name} {c_in} x {h} x {h}", inputs, contenders)


LAYERS = [
    block_layer(name, *shape)
    for name, shape in BLOCKS.items()
    if torch.cuda.is_available() or name in ("layer2.0", "layer2.1")
]
test_bottleneck = comparison(LAYERS)
