"""OverFeat, the fast model: Sermanet et al. 2013, "OverFeat: Integrated Recognition, Localization and Detection using
Convolutional Networks", arXiv:1312.6229, table 1.

As the original nvcnn_hvd.py had it: without dropout, which the paper has in the hidden layers; weights are drawn by
Glorot's rule, and biases are 0. Nobody publishes weights for it.
"""

from torch import Tensor, nn

from nvcnn.models.fused import convolutions
from nvcnn.models.layers import Classifier, Conv2d, Linear, check_size


class OverFeat(nn.Module):
    """(N, 3, 231, 231), or 4 channels of which the last is zero -> (N, num_classes)."""

    takes_padded_images = True

    def __init__(self, *, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(
            Conv2d(3, 96, 11, stride=4), nn.ReLU(), nn.MaxPool2d(2),
            Conv2d(96, 256, 5), nn.ReLU(), nn.MaxPool2d(2),
            Conv2d(256, 512, 3, padding=1), nn.ReLU(),
            Conv2d(512, 1024, 3, padding=1), nn.ReLU(),
            Conv2d(1024, 1024, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            Linear(1024 * 6 * 6, 3072), nn.ReLU(inplace=True),
            Linear(3072, 4096), nn.ReLU(inplace=True),
            Classifier(4096, num_classes),
        )  # fmt: skip
        for p in self.parameters():
            if p.ndim >= 2:
                nn.init.xavier_uniform_(p)
            else:
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        check_size("overfeat", x, 231)
        return self.classifier(convolutions(x, self.features).flatten(1))
