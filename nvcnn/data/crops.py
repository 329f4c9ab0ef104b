"""Crops images of Pillow for training and evaluation."""

import math
import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

CROP_ATTEMPTS = 10  # as torchvision and DALI


def random_crop(
    width: int, height: int, area: tuple[float, float], aspect: tuple[float, float], generator: random.Random
) -> tuple[int, int, int, int]:
    """Returns left, top, right, bottom of a random crop, in whole pixels: uniform area and place, log-uniform aspect.

    The rule of torchvision's RandomResizedCrop and of DALI: what does not fit is drawn again; in the end the largest
    crop of an allowed aspect is taken, at a random place as DALI has it (torchvision: in the middle).
    """
    logs = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(CROP_ATTEMPTS):
        target, ratio = width * height * generator.uniform(*area), math.exp(generator.uniform(*logs))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w, h = min(width, round(height * aspect[1])), min(height, round(width / aspect[0]))
        shrink = min(1.0, math.sqrt(area[1] * width * height / max(1, w * h)))
        w, h = max(1, int(w * shrink)), max(1, int(h * shrink))
    left, top = generator.randint(0, width - w), generator.randint(0, height - h)
    return left, top, left + w, top + h


def pixels(image: "Image.Image") -> Tensor:
    """Returns the pixels, (H, W, 3) uint8."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def middle(image: "Image.Image", image_size: int, crop: float) -> Tensor:
    """Returns the middle `crop` of width and height, resized to (image_size, image_size, 3) uint8.

    The resize is bilinear, with antialiasing. The cut is not rounded to whole pixels.
    """
    from PIL import Image

    margin = (1 - crop) / 2
    w, h = image.size
    box = (margin * w, margin * h, (1 - margin) * w, (1 - margin) * h)
    return pixels(image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box))
