"""How fast does the L2 cache feed a 3 x 3 convolution that reads its activation nine times, once a tap?

    y = a * W, a materialised, 3 x 3, stride 1, with sums of d and d^2 as in `resident_forward`
Tiles are boxes of an image, moved by the tap and loaded by TMA, which reads 0 outside of the image. The matrix products
of 64 channels need far less time than the reads. a and y are moved once. For every tap and 64 channels, a box and a
block of the weight are read from the L2 cache. From 6.5 TB/s such kernels will do; up to 5.5 it takes a halo in shared
memory, or cuDNN.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.probes import IMAGES, Contender, Probe, divides, errors, images, normal
from benchmarks.probes.halves import column_sums, deviation, normalised, one_row, random_norm
from benchmarks.probes.present import PADDED, library
from kernels.tiles import multiply_add

SHAPES = ((64, 56), (256, 14))  # channels in and out; pixels across
BOX_H, BOX_W, BLOCK_IN = 8, 16, 64


@triton.jit(do_not_specialize=["boxes"])
def convolution_3x3(
    a_tiles,
    weight_tiles,
    y_norm,
    y,
    sums,
    boxes,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One program computes BLOCK_OUT channels of a box of BOX_H x BOX_W pixels of one image."""
    along: tl.constexpr = (SIZE + BOX_W - 1) // BOX_W
    of_image: tl.constexpr = (SIZE + BOX_H - 1) // BOX_H * along
    blocks: tl.constexpr = K // BLOCK_OUT
    block, box = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n, top, left = box // of_image, box % of_image // along * BOX_H, box % along * BOX_W
    result = tl.zeros((BOX_H * BOX_W, BLOCK_OUT), tl.float32)
    steps: tl.constexpr = C // BLOCK_IN
    for step in range(9 * steps):
        tap, c0 = step // steps, step % steps * BLOCK_IN
        a = a_tiles.load([n, top + tap // 3 - 1, left + tap % 3 - 1, c0]).reshape(BOX_H * BOX_W, BLOCK_IN)
        w = weight_tiles.load([block * BLOCK_OUT, tap * C + c0])
        result = multiply_add(a, tl.trans(w), result, True)
    # Epilogue: a box may reach over the image.
    pixel, k = tl.arange(0, BOX_H * BOX_W), block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    i, j = top + pixel // BOX_W, left + pixel % BOX_W
    inside = ((i < SIZE) & (j < SIZE))[:, None]
    out = result.to(tl.float16)
    tl.store(y + n.to(tl.int64) * (SIZE * SIZE * K) + ((i * SIZE + j) * K)[:, None] + k[None, :], out, mask=inside)
    d = deviation(out, tl.load(y_norm + k)[None, :], tl.load(y_norm + K + k)[None, :])
    d = tl.where(inside, d, 0.0).to(tl.float16)
    zero = tl.zeros((16, BLOCK_OUT), tl.float32)
    tl.store(sums + box * K + k, one_row(column_sums(d, zero)))
    tl.store(sums + (boxes + box) * K + k, one_row(column_sums(d * d, zero)))


def count(rows: int, size: int) -> int:
    """Returns the number of boxes in all images of size x size, which have so many rows together."""
    return divides(size * size, rows) * triton.cdiv(size, BOX_H) * triton.cdiv(size, BOX_W)


def launch(a: Tensor, weight: Tensor, y_norm: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns y, (rows, K), and sums, (2, P, K), fp32.

    a: (rows, C), images of size x size. weight: (K, 3, 3, C). y_norm: (2, K), halves.
    """
    rows, c = a.shape
    k, boxes = weight.shape[0], count(rows, size)
    block_out = min(k, 256)
    y, sums = a.new_empty(rows, k), torch.empty(2, boxes, k, device=a.device)
    constants = {"SIZE": size, "C": c, "K": k, "BOX_H": BOX_H, "BOX_W": BOX_W}
    constants |= {"BLOCK_OUT": block_out, "BLOCK_IN": BLOCK_IN}
    convolution_3x3[(boxes * divides(block_out, k),)](
        TensorDescriptor.from_tensor(a.view(-1, size, size, c), [1, BOX_H, BOX_W, BLOCK_IN]),
        TensorDescriptor.from_tensor(weight.view(k, 9 * c), [block_out, BLOCK_IN]),
        *(y_norm, y, sums, boxes),
        **constants,
        num_warps=8,
        num_stages=4 if block_out < 256 else 3,
    )
    return y, sums


def operands(number: int, c: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a, weight and y_norm of `launch`, for so many images and as many channels out as in."""
    weight = normal(c, 3, 3, c, device=device, std=(9 * c) ** -0.5)
    return normal(number * size * size, c, device=device).relu(), weight, random_norm(c, device)


def check(device: torch.device) -> dict[str, float]:
    found: dict[str, float] = {}
    for c, size in SHAPES:
        a, weight, y_norm = operands(1 if device.type == "cpu" else 16, c, size, device)
        y, sums = launch(a, weight, y_norm, size)
        true_y = torch.nn.functional.conv2d(images(a, size).double(), weight.permute(0, 3, 1, 2).double(), padding=1)
        d = normalised(y, y_norm).double()
        total, squares = sums.sum(1)
        of_shape = errors(y=(images(y, size), true_y), sum=(total, d.sum(0)), squares=(squares, d.square().sum(0)))
        found |= {f"{name}, {c} channels": value for name, value in of_shape.items()}
    return found


def contenders(device: torch.device) -> dict[str, Contender]:
    made = {}
    for c, size in SHAPES:
        of = operands(IMAGES, c, size, device)
        rows = IMAGES * size * size
        needed, flops = 2 * rows * 2 * c, 2 * rows * 9 * c * c
        made[f"{c} channels"] = Contender(partial(launch, *of, size), needed, flops)
        plain = library(images(of[0], size), of[1].permute(0, 3, 1, 2), PADDED)
        made[f"cuDNN, {c} channels"] = Contender(plain, needed, flops)
    return made


def from_cache(c: int, size: int) -> float:
    """Returns the bytes that the kernel reads through the L2 cache. Of a box only those inside of the image count."""
    rows = IMAGES * size * size
    block_out = min(c, 256)
    return 9 * 2 * c * (c // block_out * rows + count(rows, size) * c)


def verdict(us: dict[str, float], factor: float) -> str:
    rate = max(from_cache(c, size) / us[f"{c} channels"] / 1e6 for c, size in SHAPES)
    words = "materialised 3 x 3 will do" if rate >= 6.5 else "halo or cuDNN" if rate <= 5.5 else "between: compare"
    return f"{words}: {rate:.2f} TB/s from the L2 cache"


PROBE = Probe(
    name="l2_rate",
    question="3 x 3 of a materialised activation by TMA, 64 and 256 channels: does the L2 cache keep up?",
    threshold="from 6.5 TB/s it does; up to 5.5 halo or cuDNN",
    seconds=6,
    tolerance=2e-3,
    check=check,
    contenders=contenders,
    verdict=verdict,
)
