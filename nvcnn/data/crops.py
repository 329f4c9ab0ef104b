"""Crops images of Pillow for training and evaluation."""

import math
import random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nvcnn.data.options import EvaluationOptions, TrainingOptions
from nvcnn.data.resize import resize

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


def cropped(image: "Image.Image", options: TrainingOptions, epoch: int, generator: random.Random) -> Tensor:
    """Returns a random crop as `options` want it in that epoch, (image_size, image_size, 3) uint8."""
    size = options.size_in(epoch)
    box = random_crop(*image.size, options.crop_area, options.crop_aspect, generator)
    out = torch.empty(size, size, 3, dtype=torch.uint8)
    resize(pixels(image.crop(box)), out)
    return out


def pixels(image: "Image.Image") -> Tensor:
    """Returns the pixels, (H, W, 3) uint8."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def middle(image: "Image.Image", options: EvaluationOptions) -> Tensor:
    """Returns the middle of the image as `options` want it, (image_size, image_size, 3) uint8.

    The resize has antialiasing. The cut is not rounded to whole pixels.
    """
    from PIL import Image

    w, h = image.size
    wide, high = (min(w, h) / w, min(w, h) / h) if options.aspect == "keep" else (1, 1)
    x, y = (1 - options.crop * wide) / 2, (1 - options.crop * high) / 2
    box = (x * w, y * h, (1 - x) * w, (1 - y) * h)
    kernel = Image.Resampling[options.interpolation.upper()]
    return pixels(image.resize((options.image_size, options.image_size), kernel, box=box))
