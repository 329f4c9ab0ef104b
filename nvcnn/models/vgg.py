"""VGG: Simonyan and Zisserman 2014, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
arXiv:1409.1556.

Names of parameters, architecture, dropout and initialisation are torchvision's, so its published weights load. The
original nvcnn_hvd.py had no dropout, and drew weights by Glorot's rule.
"""

from torch import Tensor, nn

from nvcnn.models.fused import convolutions
from nvcnn.models.layers import Classifier, Conv2d, Linear, adaptive_average

WIDTHS = (64, 128, 256, 512, 512)  # of the 3x3 convolutions between two poolings
DEPTHS = {  # how many there are: A, B, D and E of the paper's table 1
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """(N, 3, H, W), or 4 channels of which the last is zero -> (N, num_classes).

    `depth`: layers with weights.
    """

    takes_padded_images = True

    def __init__(self, *, depth: int, num_classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        c_in = 3
        for width, count in zip(WIDTHS, DEPTHS[depth], strict=True):
            for _ in range(count):
                layers += [Conv2d(c_in, width, 3, padding=1), nn.ReLU()]
                c_in = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True), nn.Dropout(),
            Linear(4096, 4096), nn.ReLU(inplace=True), nn.Dropout(),
            Classifier(4096, num_classes),
        )  # fmt: skip
        for p in self.parameters():
            if p.ndim == 4:
                nn.init.kaiming_normal_(p, mode="fan_out", nonlinearity="relu")
            elif p.ndim == 2:
                nn.init.normal_(p, 0, 0.01)
            else:
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        x = adaptive_average(convolutions(x, self.features), 7)
        return self.classifier(x.flatten(1))
