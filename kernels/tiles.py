"""How kernels of convolutions and BatchNorm find their way: tiles of pixels and channels, loads, products."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from kernels.checks import pitch_of
from kernels.configurations import Configuration, cdiv, configuration, dtype_name, next_power_of_2
from kernels.implementation import INTERPRETED

# Triton's interpreter multiplies bf16 matrices wrongly (triton-lang/triton issue 11584): there they are widened first.
# And it knows no inline assembly.
INTERPRET = tl.constexpr(INTERPRETED)
# A product on Hopper reads an operand that was formed from its registers, and goes on while the next step's is formed.
# Triton before 3.7 forms it in the same registers without waiting (triton-lang/triton issue 9433).
EARLY = tl.constexpr(not INTERPRETED and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))


def tiles_of_rows(n: int, height: int, width: int, config: Configuration) -> int:
    """Returns how many tiles the pixels of n images make, as `locate` has them."""
    rows, box_h, box_w = config["BLOCK_ROWS"], config["BOX_H"], config["BOX_W"]
    if not box_w:
        return cdiv(n * height * width, rows)
    return cdiv(n, rows // (box_h * box_w)) * cdiv(height, box_h) * cdiv(width, box_w)


@triton.jit
def corner(tile, height, width, BLOCK: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr):
    """Returns image, i and j of a box's first pixel; without BOX_W a tile's, as if all pixels were one image's row."""
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
def relaid(tile):
    """Returns the tile, (rows, columns), as it is, but laid out as it is loaded and stored.

    Triton keeps the layout of a matrix product for all that follows. That has neighbouring rows in other threads, so a
    sum over rows takes shuffles for every column, and what is loaded is laid out anew; `split` of rows cannot keep it.
    """
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    top, bottom = tl.split(tl.permute(tl.reshape(tile, (2, rows // 2, columns)), (1, 2, 0)))
    return tl.reshape(tl.permute(tl.join(top, bottom), (2, 0, 1)), (rows, columns))


@triton.jit
def load(tensor, tiles, at, inside, n, i, j, c, IMAGES: tl.constexpr = False):
    """Returns a tile, (rows, columns): by its descriptor, from (n, i, j, c) on, or tensor[at] where it is inside.

    IMAGES: the rows are images, which come behind i and j then.
    """
    if tiles is not None and IMAGES:
        return tiles.load([i, j, n, c]).reshape(at.shape[0], at.shape[1])
    if tiles is not None:
        return tiles.load([n, i, j, c]).reshape(at.shape[0], at.shape[1])
    return tl.load(tensor + at, mask=inside, other=0.0)


@triton.jit
def keep(value, rows):
    """Returns value, (rows, columns), with 0 in place of what is not in `rows`, a mask of (rows, 1) or of all values.

    Halves are selected by pairs, in one instruction. What is 0 anyway, as channels that are not there, is not masked.
    """
    if INTERPRET or value.dtype == tl.float32:
        return tl.where(rows, value, 0.0).to(value.dtype)
    asm: tl.constexpr = "and.b32 $0, $1, $2;"
    bits = tl.where(rows, -1, 0).to(tl.int16)
    return tl.inline_asm_elementwise(asm, "=r,r,r", [value, bits], dtype=value.dtype, is_pure=True, pack=2)


@triton.jit
def load_sparse(tensor, STRIDE: tl.constexpr, image, n, h, w, c, inside, H, W, C):
    """Returns the values at pixels (h, w) of images of H x W, of which `tensor` has every STRIDE-th, both ways; else 0.

    (rows, channels c), fp32. n: of a row, the image counted from `image`.
    """
    SH, SW = tl.cdiv(H, STRIDE), tl.cdiv(W, STRIDE)
    there = (h % STRIDE == 0) & (w % STRIDE == 0)
    at = ((n * SH + h // STRIDE) * SW + w // STRIDE) * C
    first = tensor + image.to(tl.int64) * SH * SW * C
    return tl.load(first + (at[:, None] + c[None, :]), mask=inside & there[:, None], other=0.0).to(tl.float32)


@triton.jit
def channels_of_groups(first, BLOCK: tl.constexpr, own, other, OWN: tl.constexpr, OTHER: tl.constexpr):
    """Returns the channels on the other side of the groups of a tile's channels, first ... first + BLOCK - 1.

    Where they begin among `other`, and how many there are; a group has OWN and OTHER channels (0: there is one group).
    A tile may span several groups: its weights are a diagonal of blocks. The first is a multiple of 16, so that loads
    are wide; what is too many has no weights.
    """
    if OWN == 0:
        return 0, other
    lowest = first // OWN * OTHER // 16 * 16
    highest = (tl.minimum(first + BLOCK, own) - 1) // OWN + 1
    return lowest, highest * OTHER - lowest


@triton.jit
def multiply_add(a, b, total, FORMED: tl.constexpr):
    """Returns total + a b, on tensor cores except for fp32, which is not rounded to TF32.

    FORMED: whether a is not as it was loaded, or is a box.
    """
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    total = tl.dot(a, b, total, input_precision="ieee")
    if EARLY and FORMED and a.dtype != tl.float32 and cuda_capability_geq(9) and not cuda_capability_geq(10):
        # Whoever uses the sum in the loop waits for it. This is no instruction in the end.
        tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r,f", [total], dtype=tl.int32, is_pure=False, pack=1)
    return total


def pitch_in_units(x: Tensor) -> tuple[int | None, int]:
    """Returns the pitch of a slice of channels in units, and the unit: 8 values, where possible; else None and 1.

    Triton only sees whether an argument is a multiple of 16, and 8 halves are what is moved at a time.
    """
    pitch = pitch_of(x)
    if pitch is None or pitch == x.shape[1]:
        return None, 1
    return (pitch // 8, 8) if pitch % 8 == 0 else (pitch, 1)


def configured_for_rows(op: str, x: Tensor) -> Configuration:
    """Returns tiles of 2 048 values, 2 loads of 16 bytes a thread in fp16; programs that fill a GPU several times.

    With 64 channels a row of fp16 is 8 threads, and the rows of norm lie in registers as the tile needs them.
    """
    c = x.shape[1]
    block_c = min(next_power_of_2(c), 64)
    computed = {"BLOCK_ROWS": 2048 // block_c, "BLOCK_C": block_c, "PROGRAMS": 1024, "num_warps": 4}
    return configuration(op, f"{dtype_name(x.dtype)} C={c} NHW={x.numel() // c}", x.device, computed)
