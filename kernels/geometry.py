"""The geometry of a convolution, as its three ops take it: the checks of it, and how kernels find their way.

A convolution over (N, C, H, W), channels-last, is a matrix product: a row is a pixel of the result, a column a channel,
and the sum runs over taps (r, s) and channels of one pixel. Only addresses tell it from a matrix product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.configurations import Configuration, capability, cdiv, configuration, dtype_name
from kernels.images import check_images, check_tensors, single_or_double
from kernels.implementation import INTERPRETED
from kernels.launch import state

# Triton's interpreter multiplies bf16 matrices wrongly (triton-lang/triton issue 11584): there they are widened first.
WIDE = tl.constexpr(INTERPRETED)
TILE = ("R", "S", "STRIDE_H", "BLOCK_ROWS", "BLOCK_OUT", "BLOCK_IN")  # of a kernel's constants, what a profile shows
MOST_ROWS = 256  # of a tile: within it offsets have 32 bits, from its first image on


@dataclass(frozen=True, eq=False)
class Geometry:
    """x: (n, c, h, w); weight: (k, c / groups, r, s); y: (n, k, oh, ow). Made once, since every launch asks for it."""

    n: int
    c: int
    h: int
    w: int
    k: int
    oh: int
    ow: int
    r: int
    s: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int

    @cached_property
    def input(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @cached_property
    def output(self) -> tuple[int, int, int, int]:
        return self.n, self.k, self.oh, self.ow

    @cached_property
    def rows(self) -> int:
        """Pixels of y."""
        return self.n * self.oh * self.ow

    @cached_property
    def narrow(self) -> int:
        """The number of channels, if they are so few that the taps of one row are taken together; else 0.

        Those taps' values lie side by side in x and in the weight: a run of S C, as good as that many channels.
        """
        return self.c if self.c <= 8 and self.groups == 1 and self.s > 1 else 0

    @cached_property
    def run(self) -> int:
        """Values of x side by side that a tap takes."""
        return self.narrow * self.s or self.c

    @cached_property
    def pointwise(self) -> bool:
        """Whether a row of y is one of x."""
        return self.r * self.s * self.stride[0] * self.stride[1] == 1 and not any(self.padding)

    @cached_property
    def constants(self) -> dict[str, int]:
        """What kernels are compiled for."""
        of_axes = dict(zip(("STRIDE_H", "STRIDE_W", "PADDING_H", "PADDING_W"), self.stride + self.padding, strict=True))
        of_groups = {"GROUP_OUT": self.k // self.groups, "GROUP_IN": self.c // self.groups}
        return {"R": self.r, "S": self.s} | (of_groups if self.groups > 1 else dict.fromkeys(of_groups, 0)) | of_axes

    @cached_property
    def key(self) -> str:
        """All of it, for the table of configurations."""
        return (
            f"N={self.n} C={self.c} H={self.h} W={self.w} K={self.k} R={self.r} S={self.s} "
            f"stride={self.stride[0]},{self.stride[1]} padding={self.padding[0]},{self.padding[1]} G={self.groups}"
        )


def geometry(
    op: str, size: tuple[int, int, int, int], weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int
) -> Geometry:
    """Raises ValueError unless a weight of that shape can be applied to (N, C, H, W) = `size`."""
    sizes = tuple(map(int, size)), tuple(map(int, weight.shape))  # a compiler's may be symbols
    return geometry_of(op, *sizes, tuple(stride), tuple(padding), groups)


@cache
def geometry_of(
    op: str,
    size: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
) -> Geometry:
    n, c, h, w = size
    k, width, r, s = weight
    if len(stride) != 2 or len(padding) != 2 or min(stride) < 1 or min(padding) < 0:
        raise ValueError(f"{op}: stride and padding are two each, of H and W, from 1 and 0; got {stride}, {padding}")
    if groups < 1 or c != width * groups or k % groups:
        raise ValueError(
            f"{op}: {groups} groups of the weight {weight} take {width * groups} channels, and give a "
            f"multiple of {groups}; the input has {c}"
        )
    oh = (h + 2 * padding[0] - r) // stride[0] + 1
    ow = (w + 2 * padding[1] - s) // stride[1] + 1
    if oh < 1 or ow < 1:
        raise ValueError(f"{op}: {h} x {w} pixels and padding {padding} are smaller than the weight's {r} x {s}")
    pixels = min(oh * ow, max(1, (h // stride[0]) * (w // stride[1])))
    if min(n, MOST_ROWS // pixels + 2) * max(c * h * w, k * oh * ow) >= 2**31 or prod(weight) >= 2**31:
        raise ValueError(
            f"{op}: {MOST_ROWS} rows reach over 2^31 values of images {size[1:]} and {(k, oh, ow)}, "
            f"or the weight {weight} has as many"
        )
    return Geometry(n, c, h, w, k, oh, ow, r, s, (stride[0], stride[1]), (padding[0], padding[1]), groups)


def box_of(rows: int, n: int, height: int, width: int) -> tuple[int, int]:
    """Returns height and width of a box of `rows` pixels, of one image or several, few of which cover n images."""
    powers = [2**i for i in range(rows.bit_length())]
    boxes = [(h, w) for w in powers for h in powers if h * w <= rows]

    def tiles(box: tuple[int, int]) -> int:
        return cdiv(n, rows // prod(box)) * cdiv(height, box[0]) * cdiv(width, box[1])

    return min(boxes, key=lambda box: (tiles(box), -box[1], -box[0]))


def box_sizes(shape: Geometry, rows: int, height: int, width: int) -> dict[str, int]:
    """Returns the choice of a box for tiles of images of that size; rows of pixels need none where they follow."""
    if shape.pointwise:
        return {}
    return dict(zip(("BOX_H", "BOX_W"), box_of(rows, shape.n, height, width), strict=True))


def two_programs(element_size: int, gpu: int) -> dict[str, int]:
    """Returns the choice of 128 registers, so that two programs of 8 warps fit an SM of Hopper; others would spill."""
    return {"maxnreg": 128} if element_size == 2 and gpu == 9 else {}


def configured_for(
    op: str, x: Tensor, shape: Geometry, fusion: str, computed: Callable[[Geometry, str, int, int], Configuration]
) -> Configuration:
    """Returns the table's configuration of the op, or the computed; BOX_H and BOX_W are 0 where tiles are no boxes.

    `computed`: of geometry, fusion, bytes a value and the GPU's capability, remembered by them.
    Raises ValueError for a tile that 32 bits do not reach across, or that no whole number of boxes fills.
    """
    own = computed(shape, fusion, x.element_size(), capability(x.device))
    config = configuration(op, f"{dtype_name(x.dtype)} {shape.key} {fusion}", x.device, own)
    rows = config["BLOCK_ROWS"]
    if rows > MOST_ROWS:
        raise ValueError(f"{op}: BLOCK_ROWS is {rows} in the table for {shape.key}; at most {MOST_ROWS}")
    if not config.get("TMA") or shape.pointwise:
        return {**config, "BOX_H": 0, "BOX_W": 0}
    pixels = config.get("BOX_H", 0) * config.get("BOX_W", 0)
    if pixels < 1 or rows % pixels:
        raise ValueError(f"{op}: with TMA, BOX_H x BOX_W divides BLOCK_ROWS; got {dict(config)} for {shape.key}")
    if rows // pixels * max(shape.c * shape.h * shape.w, shape.k * shape.oh * shape.ow) >= 2**31:
        raise ValueError(
            f"{op}: a box of {rows // pixels} images reaches over 2^31 values: {dict(config)}, {shape.key}"
        )
    return config


def tiles_of_rows(n: int, height: int, width: int, config: Configuration) -> int:
    """Returns how many tiles the pixels of n images make, as `locate` has them."""
    rows, box_h, box_w = config["BLOCK_ROWS"], config["BOX_H"], config["BOX_W"]
    if not box_w:
        return cdiv(n * height * width, rows)
    return cdiv(n, rows // (box_h * box_w)) * cdiv(height, box_h) * cdiv(width, box_w)


def launch_options(
    op: str, shape: Geometry, config: Configuration, **tensors: tuple[Tensor | None, str, str]
) -> dict[str, int | TensorDescriptor | None]:
    """The keyword arguments of a launch: the configuration and, by name, NAME_tiles.

    These are None, or for {"TMA": 1} descriptors, by which Hopper's and later GPUs load whole tiles of a channels-last
    tensor, config[rows] x config[columns] of (N, H, W, C): BLOCK_ROWS are pixels as in `locate`, other rows are N. What
    is outside of the tensor is read as 0, as padding is. ValueError where that is not possible.
    """
    options: dict[str, int | TensorDescriptor | None] = {name: n for name, n in config.items() if name != "TMA"}
    for name, (tensor, rows, columns) in tensors.items():
        options[f"{name}_tiles"] = None
        if tensor is None or not config.get("TMA") or state.silent:
            continue
        n, c, h, w = tensor.shape
        box = [config[rows], 1, 1]
        if rows == "BLOCK_ROWS":
            box_h, box_w = (config["BOX_H"], config["BOX_W"]) if config["BOX_W"] else (1, config[rows])
            box = [config[rows] // (box_h * box_w), box_h, box_w]
            if shape.pointwise:
                n, h, w = 1, 1, n * h * w  # all pixels are one row
        step_h, step_w = shape.stride if name == "x" else (1, 1)
        strided = step_h * step_w > 1 and (shape.r * shape.s > 1 or any(shape.padding))
        narrow = name == "x" and shape.narrow
        unaligned = c * tensor.element_size() % 16 or tensor.data_ptr() % 16
        if shape.groups > 1 or narrow or strided or unaligned or w >= 2**31:
            raise ValueError(
                f"{op}: TMA is for channels of a multiple of 16 bytes at such an address, without groups, and under "
                "2^31 pixels; of x with several taps side by side for more than 8 channels, and with a stride for a "
                f"1 x 1 weight without padding; got {dict(config)} for {shape.key}, {name} {tuple(tensor.shape)}"
            )
        size = [n, cdiv(h, step_h), cdiv(w, step_w), c]
        strides = [h * w * c, step_h * w * c, step_w * c, 1]
        options[f"{name}_tiles"] = TensorDescriptor(tensor, size, strides, [*box, config[columns]])
    return options


def check_weight(op: str, name: str, weight: Tensor, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """ValueError unless it is (K, C / groups, R, S), channels-last, of one of the dtypes, on that device."""
    check_images(op, name, weight)
    if weight.dtype not in dtypes or weight.device != device:
        raise ValueError(
            f"{op}: {name} must be {' or '.join(map(str, dtypes))}, on {device}; got {weight.dtype}, on {weight.device}"
        )


def check_like(op: str, like: Tensor, /, **others: Tensor | None) -> None:
    """ValueError for the first of the others that has not the shape, dtype, layout and device of `like`."""
    for name, tensor in others.items():
        if tensor is not None:
            check_images(op, name, tensor, like=like)


def check_channels(op: str, x: Tensor, channels: int, /, **norm: tuple[Tensor | None, int]) -> None:
    """ValueError for the first that is not (rows, channels), or (channels,) for 0 rows, in the dtype of sums over x."""
    for name, (tensor, rows) in norm.items():
        if tensor is not None:
            shape = (rows, channels) if rows else (channels,)
            check_tensors(op, x.device, single_or_double(x), **{name: (tensor, shape)})


def check_together(op: str, /, **tensors: Tensor | None) -> None:
    """ValueError if some of them are there and others not."""
    missing = [name for name, tensor in tensors.items() if tensor is None]
    if missing and len(missing) < len(tensors):
        raise ValueError(f"{op}: {', '.join(tensors)} come together or not at all; got no {' and no '.join(missing)}")


def empty_sums(x: Tensor, read: Tensor | None, parts: int, channels: int) -> Tensor:
    """Returns room for two sums a channel over `parts` parts of the rows; for none where `read` is not there."""
    size = 0 if read is None else (2, parts, channels)
    return torch.empty(size, dtype=single_or_double(x), device=x.device)


@triton.jit
def corner(tile, height, width, BLOCK: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr):
    """Image, i and j of a box's first pixel; without BOX_W of a tile's, if all pixels were one row of one image."""
    if BOX_W:
        along = tl.cdiv(width, BOX_W)
        boxes = tl.cdiv(height, BOX_H) * along
        return tile // boxes * (BLOCK // (BOX_H * BOX_W)), tile % boxes // along * BOX_H, tile % along * BOX_W
    return 0, 0, tile * BLOCK


@triton.jit
def locate(tile, rows, height, width, BLOCK: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr):
    """Returns first image, image counted from it, i, j and mask of a tile's BLOCK rows, pixels of (N, height, width).

    The pixels follow each other, or with BOX_W are boxes of BOX_H x BOX_W in images side by side; ends may reach over.
    """
    row = tl.arange(0, BLOCK)
    if BOX_W:
        image, top, left = corner(tile, height, width, BLOCK, BOX_H, BOX_W)
        n, i, j = row // (BOX_H * BOX_W), top + row % (BOX_H * BOX_W) // BOX_W, left + row % BOX_W
        exists = (i < height) & (j < width) & ((image + n).to(tl.int64) * (height * width) < rows)
        return image.to(tl.int64), n, i, j, exists
    first = tile.to(tl.int64) * BLOCK
    image = first // (height * width)
    row_of_image = row + (first - image * (height * width)).to(tl.int32)
    n = row_of_image // (height * width)
    pixel = row_of_image - n * (height * width)
    i = pixel // width
    return image, n, i, pixel - i * width, row < rows - first


@triton.jit
def load(tensor, tiles, at, inside, n, i, j, c):
    """A tile, (rows, columns): by its descriptor, from (n, i, j, c) on, or tensor[at] where it is inside."""
    if tiles is not None:
        return tiles.load([n, i, j, c]).reshape(at.shape[0], at.shape[1])
    return tl.load(tensor + at, mask=inside, other=0.0)


@triton.jit
def channels_of_groups(first, BLOCK: tl.constexpr, own, other, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Of the groups of a tile's channels, first ... first + BLOCK - 1 of `own`: the channels on the other side.

    Where they begin among `other`, and how many there are; a group has OWN and OTHER channels (0: there is one group).
    A tile may span several groups: its weights are a diagonal of blocks. The first is a multiple of 16, so that loads
    are wide; what is too many has no weights.
    """
    if OWN == 0:
        return 0, other
    lowest = first // OWN * OTHER // 16 * 16
    highest = (tl.minimum(first + BLOCK, own) - 1) // OWN + 1
    return lowest, highest * OTHER - lowest


def most_channels_of_groups(shape: Geometry, block: int) -> int:
    """Of c, over all tiles of `block` channels of k: the most that channels_of_groups finds."""
    own, other = shape.k // shape.groups, shape.c // shape.groups
    return max(
        ((min(first + block, shape.k) - 1) // own + 1) * other - first // own * other // 16 * 16
        for first in range(0, shape.k, block)
    )


@triton.jit
def multiply_add(a, b, total):
    """total + a b, on tensor cores but for fp32, which is not rounded to TF32."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def normalised(x, norm, c, channel, C):
    """(x - mean) scale + shift, with the first rows of norm, (5, C): x is (rows, channels c)."""
    mean = tl.load(norm + c, mask=channel, other=0.0)[None, :]
    scale = tl.load(norm + C + c, mask=channel, other=0.0)[None, :]
    shift = tl.load(norm + 2 * C + c, mask=channel, other=0.0)[None, :]
    return (x.to(tl.float32) - mean) * scale + shift


@triton.jit
def through_batch_norm(g, y, norm, factors, inside, k, channel, K):
    """dy, the gradient behind BatchNorm: scale g + factors[0] (y - mean) + factors[1]; g, y: (rows, channels k)."""
    scale = tl.load(norm + K + k, mask=channel, other=0.0)[None, :]
    dy = scale * g.to(tl.float32)
    if factors is not None:
        mean = tl.load(norm + k, mask=channel, other=0.0)[None, :]
        slope = tl.load(factors + k, mask=channel, other=0.0)[None, :]
        offset = tl.load(factors + K + k, mask=channel, other=0.0)[None, :]
        dy += slope * (y.to(tl.float32) - mean) + offset
    return tl.where(inside, dy, 0.0)
