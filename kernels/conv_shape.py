"""The shape of a convolution, as its three ops take it: the checks of it, and how it is configured and launched.

A convolution over (N, C, H, W), channels-last, is a matrix product: a row is a pixel of the result, a column a channel,
and the sum runs over taps (r, s) and channels of one pixel. Only addresses tell it from a matrix product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.configurations import Configuration, capability, cdiv, configuration, dtype_name, next_power_of_2
from kernels.launch import state

TILE = ("R", "S", "STRIDE_H", "BLOCK_ROWS", "BLOCK_OUT", "BLOCK_IN")  # of a kernel's constants, what a profile shows
IMAGES = 128  # of a tile of rows, or half of it, where it is one pixel of as many images
MOST_ROWS = 256  # of a tile: within it offsets have 32 bits, from its first image on


@dataclass(frozen=True, eq=False)
class ConvShape:
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
        """Returns the number of pixels of y."""
        return self.n * self.oh * self.ow

    @cached_property
    def narrow(self) -> int:
        """Returns the number of channels if they are so few that the taps of one row are taken together, else 0.

        Those taps' values lie side by side in x and in the weight: a run of S C, as good as that many channels.
        """
        return self.c if self.c <= 8 and self.groups == 1 and self.s > 1 else 0

    @cached_property
    def run(self) -> int:
        """Returns how many values of x side by side a tap takes."""
        return self.narrow * self.s or self.c

    @cached_property
    def pointwise(self) -> bool:
        """Returns whether a row of y is one of x."""
        return self.r * self.s * self.stride[0] * self.stride[1] == 1 and not any(self.padding)

    @cached_property
    def constants(self) -> dict[str, int]:
        """Returns what kernels are compiled for."""
        of_axes = dict(zip(("STRIDE_H", "STRIDE_W", "PADDING_H", "PADDING_W"), self.stride + self.padding, strict=True))
        of_groups = {"GROUP_OUT": self.k // self.groups, "GROUP_IN": self.c // self.groups}
        return {"R": self.r, "S": self.s} | (of_groups if self.groups > 1 else dict.fromkeys(of_groups, 0)) | of_axes

    @cached_property
    def key(self) -> str:
        """Returns all of it as the key of the table of configurations."""
        return (
            f"N={self.n} C={self.c} H={self.h} W={self.w} K={self.k} R={self.r} S={self.s} "
            f"stride={self.stride[0]},{self.stride[1]} padding={self.padding[0]},{self.padding[1]} G={self.groups}"
        )


def conv_shape(
    op: str, size: tuple[int, int, int, int], weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int
) -> ConvShape:
    """Returns the shape. Raises ValueError unless a weight of that shape can be applied to (N, C, H, W) = `size`."""
    sizes = tuple(map(int, size)), tuple(map(int, weight.shape))  # a compiler's may be symbols
    return conv_shape_of(op, *sizes, tuple(stride), tuple(padding), groups)


@cache
def conv_shape_of(
    op: str,
    size: tuple[int, ...],
    weight: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    groups: int,
) -> ConvShape:
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
    return ConvShape(n, c, h, w, k, oh, ow, r, s, (stride[0], stride[1]), (padding[0], padding[1]), groups)


def box_of(rows: int, n: int, height: int, width: int) -> tuple[int, int]:
    """Returns height and width of a box of `rows` pixels, of one image or several, few of which cover n images."""
    powers = [2**i for i in range(rows.bit_length())]
    boxes = [(h, w) for w in powers for h in powers if h * w <= rows]

    def tiles(box: tuple[int, int]) -> int:
        return cdiv(n, rows // prod(box)) * cdiv(height, box[0]) * cdiv(width, box[1])

    return min(boxes, key=lambda box: (tiles(box), -box[1], -box[0]))


def box_sizes(shape: ConvShape, rows: int, height: int, width: int) -> dict[str, int]:
    """Returns the choice of a box for tiles of images of that size; rows of pixels need none where they follow."""
    if shape.pointwise:
        return {}
    return dict(zip(("BOX_H", "BOX_W"), box_of(rows, shape.n, height, width), strict=True))


def by_tma(shape: ConvShape, element_size: int, gpu: int) -> bool:
    """Returns whether Hopper's TMA can load the rows of a pointwise convolution of halves, and the weight.

    What is configured for it was measured on a H200, among some 30 configurations a layer of ResNet-50.
    """
    aligned = shape.c % 8 == shape.k % 8 == 0  # 16 bytes
    return gpu == 9 and element_size == 2 and shape.pointwise and shape.groups == 1 and aligned and shape.rows < 2**31


def images_by_tma(shape: ConvShape, element_size: int, gpu: int) -> bool:
    """Returns whether TMA can load tiles of IMAGES images, one pixel of each, at every tap: what is outside comes as 0.

    So no row is wasted, whatever H and W are, and a product reads the tile where TMA has put it.
    """
    enough = shape.n % IMAGES == 0 and IMAGES * max(shape.c * shape.h * shape.w, shape.k * shape.oh * shape.ow) < 2**31
    aligned = shape.c % 8 == shape.k % 8 == 0 and not shape.narrow
    return gpu == 9 and element_size == 2 and shape.groups == 1 and aligned and enough and not shape.pointwise


def two_programs(element_size: int, gpu: int) -> dict[str, int]:
    """Returns the choice of 128 registers, so that two programs of 8 warps fit an SM of Hopper; others would spill."""
    return {"maxnreg": 128} if element_size == 2 and gpu == 9 else {}


def configured_for(
    op: str, x: Tensor, shape: ConvShape, fusion: str, computed: Callable[[ConvShape, str, int, int], Configuration]
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


def launch_options(
    op: str, shape: ConvShape, config: Configuration, **tensors: tuple[Tensor | None, str, str]
) -> dict[str, int | TensorDescriptor | None]:
    """Returns the keyword arguments of a launch: the configuration and, by name, NAME_tiles.

    These are None, or for {"TMA": 1} descriptors, by which Hopper's and later GPUs load whole tiles of a channels-last
    tensor, config[rows] x config[columns] of (N, H, W, C): BLOCK_ROWS are pixels as in `locate`, other rows are N. What
    is outside of the tensor is read as 0, as padding is. Of boxes of one pixel H and W come before N. None for a tensor
    that does not begin at a multiple of 16 bytes. ValueError where the geometry does not allow it.
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
        images = box[1:] == [1, 1] and rows == "BLOCK_ROWS"  # of one pixel, which is found by its own i and j
        step_h, step_w = shape.stride if name == "x" and not images else (1, 1)
        strided = step_h * step_w > 1 and (shape.r * shape.s > 1 or any(shape.padding))
        narrow = name == "x" and shape.narrow
        if tensor.data_ptr() % 16:
            continue  # a slice: pointers reach it as well
        unaligned = c * tensor.element_size() % 16
        if shape.groups > 1 or narrow or strided or unaligned or w >= 2**31:
            raise ValueError(
                f"{op}: TMA is for channels of a multiple of 16 bytes, without groups, and under 2^31 pixels; of x "
                "with several taps side by side for more than 8 channels, and with a stride for boxes of 1 x 1, or a "
                "1 x 1 weight without padding; "
                f"got {dict(config)} for {shape.key}, {name} {tuple(tensor.shape)}"
            )
        size = [n, cdiv(h, step_h), cdiv(w, step_w), c]
        strides = [h * w * c, step_h * w * c, step_w * c, 1]
        if images:
            # A product reads the tile from where it is loaded to only if there is no axis between its rows and columns.
            size, strides, box = ([axes[1], axes[2], axes[0], *axes[3:]] for axes in (size, strides, box))
        options[f"{name}_tiles"] = TensorDescriptor(tensor, size, strides, [*box, config[columns]])
    return options


def most_channels_of_groups(shape: ConvShape, block: int) -> int:
    """Returns the most channels of c that `channels_of_groups` finds for a tile of `block` channels of k."""
    own, other = shape.k // shape.groups, shape.c // shape.groups
    return max(
        ((min(first + block, shape.k) - 1) // own + 1) * other - first // own * other // 16 * 16
        for first in range(0, shape.k, block)
    )


def fusion_of(**tensors: Tensor | None) -> str:
    """Returns the names of the tensors that are given: a configuration depends on them."""
    return "+".join(name for name, tensor in tensors.items() if tensor is not None) or "alone"


def tile_of(channels: int, most: int) -> int:
    """Returns the least power of two that holds the channels, from 16 on (the least for tensor cores), up to `most`."""
    return min(most, max(16, next_power_of_2(channels)))
