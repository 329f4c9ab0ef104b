"""Batches: what a reader hands to the training loop, and how they become the network's input."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

import kernels

MEAN, DEVIATION = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # ImageNet's, of pixels in 0 .. 1, as torchvision has them
SCALE_SHIFT = {  # of pixels in 0 .. 255, per channel (R, G, B)
    "signed": ([2 / 255] * 3, [-1.0] * 3),
    "imagenet": ([1 / (255 * d) for d in DEVIATION], [-m / d for m, d in zip(MEAN, DEVIATION, strict=True)]),
}


class Batch(NamedTuple):
    """images: (N, H, W, 3) uint8. labels: (N,) int64, zero-based. flip: (N,) bool, the images to mirror."""

    images: Tensor
    labels: Tensor
    flip: Tensor


class MixedBatch(NamedTuple):
    """A Batch whose images are to be mixed with those of the batch in reverse order, and so are its labels.

    mix: (6,) fp32: the share of an image's own label, then what `kernels.prepare_input` mixes pixels by.
    """

    images: Tensor
    labels: Tensor
    flip: Tensor
    mix: Tensor


@cache
def scale_shift(normalize: str, device: torch.device) -> list[Tensor]:
    """Returns scale and shift of the channels, each (3,) fp32, copied from the host once."""
    return [torch.tensor(per_channel, dtype=torch.float32, device=device) for per_channel in SCALE_SHIFT[normalize]]


def prepare_input(
    images: Tensor,
    flip: Tensor,
    mix: Tensor | None = None,
    *,
    dtype: torch.dtype,
    normalize: str,
    channels: int = 3,
    into: Tensor | None = None,
) -> Tensor:
    """Returns the network's input, (N, channels, H, W) channels-last: mirrored where `flip`, normalised in fp32, cast.

    images: (N, H, W, 3) uint8. flip: (N,) bool. mix: of a MixedBatch. normalize: "signed", to [-1, 1], or "imagenet",
    by mean and deviation. channels: 3, or 4 or 8 of which the last are zero. into: a tensor for it, instead of a new
    one.
    """
    scale, shift = scale_shift(normalize, images.device)
    mixed = () if mix is None else (mix[1:],)
    if into is None:
        return kernels.prepare_input(images, flip, scale, shift, dtype, channels, *mixed)
    kernels.prepare_input_into(images, flip, scale, shift, into, *mixed)
    return into


def pixels(input: Tensor, normalize: str) -> Tensor:
    """Returns the pixels of which `prepare_input` made that input: (N, H, W, 3) uint8, mirrored where it is."""
    scale, shift = scale_shift(normalize, input.device)
    values = (input[:, :3].float().permute(0, 2, 3, 1) - shift) / scale
    return values.round().clamp(0, 255).byte()
