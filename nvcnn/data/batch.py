"""What the training loop gets from a data source, and what the network gets of that."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

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


@cache
def _rows(normalize: str, width: int, device: torch.device) -> list[Tensor]:
    """Scale and shift of a row of pixels, (3 * width,) fp32 each: long inner loops, and no copy from the host later."""
    return [
        torch.tensor(per_channel * width, dtype=torch.float32, device=device) for per_channel in SCALE_SHIFT[normalize]
    ]


def prepare_input(images: Tensor, flip: Tensor, *, dtype: torch.dtype, normalize: str) -> Tensor:
    """The network's input, (N, 3, H, W), channels-last: mirrored where `flip`, normalised in fp32, cast to `dtype`.

    images: (N, H, W, 3) uint8. flip: (N,) bool. normalize: "signed", to [-1, 1], or "imagenet", by mean and deviation.
    """
    n, h, w, c = images.shape
    scale, shift = _rows(normalize, w, images.device)
    mirrored = torch.where(flip.view(n, 1, 1, 1), images.flip(2), images)
    x = mirrored.view(n, h, w * c).to(torch.float32)
    return torch.addcmul(shift, x, scale, out=x).to(dtype).view(n, h, w, c).permute(0, 3, 1, 2)
