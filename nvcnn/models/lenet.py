"""LeNet: LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition".

With ReLU, max pooling and convolutions padded to keep the size, as the original nvcnn had it.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from nvcnn.models.fused import conv_relu, max_pool
from nvcnn.models.layers import Classifier, Conv2d, Linear, check_size, flatten


class LeNet(nn.Module):
    """(N, 3, 28, 28), or 4 channels of which the last is zero -> (N, num_classes)."""

    takes_padded_images = True

    def __init__(self, *, num_classes: int):
        super().__init__()
        self.conv1 = Conv2d(3, 32, 5, padding=2)
        self.conv2 = Conv2d(32, 64, 5, padding=2)
        self.fc1 = Linear(7 * 7 * 64, 512)
        self.fc2 = Classifier(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        check_size("lenet", x, 28)
        x = max_pool(conv_relu(x, self.conv1), 2, stride=2)
        x = max_pool(conv_relu(x, self.conv2), 2, stride=2)
        return self.fc2(F.relu(self.fc1(flatten(x)), inplace=True))
