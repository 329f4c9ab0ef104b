"""Times turning uint8 pixels into the network's input (mirror, normalise, cast) against PyTorch's operators."""

import torch
from torch import Tensor, nn

from benchmarks.layers import Layer, comparison, device_and_batch, modules
from nvcnn.data.batch import prepare_input, scale_shift


class Ours(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, images: Tensor, flip: Tensor) -> Tensor:
        return prepare_input(images, flip, dtype=self.dtype, normalize="imagenet")


class Plain(Ours):
    def forward(self, images: Tensor, flip: Tensor) -> Tensor:
        scale, shift = scale_shift("imagenet", images.device)
        mirrored = torch.where(flip.view(-1, 1, 1, 1), images.flip(2), images)
        return (mirrored * scale + shift).to(self.dtype).permute(0, 3, 1, 2)


def pixels(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch = device_and_batch()[2]
    images = torch.randint(0, 256, (batch, 224, 224, 3), dtype=torch.uint8, device=device)
    return images, torch.arange(batch, device=device) % 2 == 0


DTYPE = device_and_batch()[1]
LAYERS = [Layer("prepare_input 224 x 224", pixels, modules(lambda: Ours(DTYPE), lambda: Plain(DTYPE)), phases=(False,))]
test_prepare_input = comparison(LAYERS)
