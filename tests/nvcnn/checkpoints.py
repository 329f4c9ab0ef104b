"""Makes checkpoints without a run."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from nvcnn import checkpoint
from nvcnn.models import build_model
from nvcnn.models.layers import BatchNorm2d


@cache
def weights_of(model: str, num_classes: int, size: int, **options: Any) -> dict[str, Tensor]:
    """Returns random weights, with the running statistics of a few images of noise. They are not to be changed."""
    made = build_model(model, num_classes=num_classes, seed=7, **options)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(5)
        for bn in made.modules():
            if isinstance(bn, BatchNorm2d):
                nn.init.uniform_(bn.weight, 0.5, 1.5)
                nn.init.uniform_(bn.bias, -0.5, 0.5)
        made(torch.randn(4, 3, size, size).contiguous(memory_format=torch.channels_last))
    for bn in made.modules():
        if isinstance(bn, BatchNorm2d):
            bn.running_mean.copy_(bn.batch_mean)
            bn.running_var.copy_(bn.batch_var)
    return made.state_dict()


def state_of(
    model: str, num_classes: int = 10, options: dict[str, Any] | None = None, size: int = 28, **entries: Any
) -> dict:
    """Returns as much of a checkpoint as weights are read from."""
    return {
        "format": checkpoint.FORMAT,
        "version": checkpoint.VERSION,
        "model": model,
        "num_classes": num_classes,
        "class_names": [],
        "settings": {"label_base": 3, "fp16": True, "bf16": False},
        "preprocessing": {"image_size": size, "normalize": "imagenet", "eval_crop": 1.0},
        "options": options or {},
        "weights": weights_of(model, num_classes, size, **options or {}),
        "optimizer": {"counters": torch.tensor([9, 8, 7])},
    } | entries
