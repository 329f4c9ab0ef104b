"""AlexNet, the variant of Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks",
arXiv:1404.5997.

It has neither groups nor local response normalisation. Names of parameters, initialisation (PyTorch's own) and dropout
before each hidden layer are torchvision's; the original nvcnn_hvd.py had dropout behind them, and Glorot's rule. As
there, the first convolution has no padding and images have 227 x 227 pixels. torchvision's published weights are for
224 x 224 with `padding` 2.
"""

from torch import Tensor, nn

from nvcnn.models.fused import convolutions
from nvcnn.models.layers import Classifier, Conv2d, Linear, adaptive_average


class AlexNet(nn.Module):
    """(N, 3, H, W), or 4 channels of which the last is zero -> (N, num_classes).

    `padding`: of the first convolution.
    """

    takes_padded_images = True

    def __init__(self, *, num_classes: int, padding: int = 0):
        super().__init__()
        self.features = nn.Sequential(
            Conv2d(3, 64, 11, stride=4, padding=padding), nn.ReLU(), nn.MaxPool2d(3, 2),
            Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Dropout(), Linear(256 * 6 * 6, 4096), nn.ReLU(inplace=True),
            nn.Dropout(), Linear(4096, 4096), nn.ReLU(inplace=True),
            Classifier(4096, num_classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = adaptive_average(convolutions(x, self.features), 6)
        return self.classifier(x.flatten(1))
