"""The smallest network: one hidden unit. For measuring everything but the model."""

import torch.nn.functional as F
from torch import Tensor, nn

from nvcnn.models.layers import Classifier, Linear, check_size, flatten


class Trivial(nn.Module):
    """(N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(self, *, num_classes: int):
        super().__init__()
        self.fc1 = Linear(3 * 224 * 224, 1)
        self.fc2 = Classifier(1, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        check_size("trivial", x, 224)
        return self.fc2(F.relu(self.fc1(flatten(x)), inplace=True))
