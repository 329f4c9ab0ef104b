"""The models of convolutions with bias, VGG, AlexNet and OverFeat, against torchvision's or a plain build."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

from nvcnn.meta import activation_bytes
from nvcnn.models import ALGORITHMS, MODELS, build_model
from nvcnn.models.layers import Classifier, Linear
from tests.nvcnn.models.test_resnet import choose, relative_error

NAMES = ["alexnet", "vgg11", "vgg13", "vgg16", "vgg19"]
OPTIONS = {"alexnet": {"padding": 2}}


class OverFeat(nn.Module):
    """The fast model of the paper's table 1 as anybody would write it, with the original's padding."""

    def __init__(self, num_classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        c_in = 3
        for c_out, size, stride, padding, pools in (
            (96, 11, 4, 0, True),
            (256, 5, 1, 0, True),
            (512, 3, 1, 1, False),
            (1024, 3, 1, 1, False),
            (1024, 3, 1, 1, True),
        ):
            layers += [nn.Conv2d(c_in, c_out, size, stride, padding), nn.ReLU()] + [nn.MaxPool2d(2)] * pools
            c_in = c_out
        self.features = nn.Sequential(*layers)
        hidden = [nn.Linear(1024 * 6 * 6, 3072), nn.ReLU(), nn.Linear(3072, 4096), nn.ReLU()]
        self.classifier = nn.Sequential(*hidden, nn.Linear(4096, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def peer(name: str, num_classes: int = 1000) -> nn.Module:
    return OverFeat(num_classes) if name == "overfeat" else getattr(torchvision.models, name)(num_classes=num_classes)


def narrow(model: nn.Module, linear: type[nn.Linear], classifier: type[nn.Linear]) -> nn.Module:
    """Gives the hidden layers 16 units, since 4 096 in float64 take gigabytes, and no dropout."""
    layers = model.classifier
    found = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    layers[found[0]] = linear(layers[found[0]].in_features, 16)
    layers[found[1]] = linear(16, 16)
    layers[found[2]] = classifier(16, 10)
    for layer in layers:
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return model


def pair(name: str, dtype: torch.dtype, algorithm: str) -> tuple[nn.Module, nn.Module]:
    """Returns ours and theirs with equal weights, whose biases are not 0."""
    torch.manual_seed(0)
    with torch.device("meta"):
        ours = build_model(name, num_classes=10, seed=1, **OPTIONS.get(name, {}))
        theirs = peer(name, 10)
    ours, theirs = (narrow(net, *kinds) for net, kinds in ((ours, (Linear, Classifier)), (theirs, 2 * [nn.Linear])))
    ours, theirs = (net.to_empty(device="cpu").to(dtype) for net in (ours, theirs))
    for module in ours.modules():
        if isinstance(module, nn.Conv2d):
            module.unit_norm = torch.tensor([0, 1, 0, 1, 0], dtype=dtype).repeat(module.out_channels, 1).T.contiguous()
    for p in theirs.parameters():
        nn.init.kaiming_uniform_(p) if p.ndim >= 2 else nn.init.uniform_(p, -0.3, 0.3)
    ours.load_state_dict(theirs.state_dict())
    return choose(ours, algorithm).to(memory_format=torch.channels_last), theirs


def images(name: str, dtype: torch.dtype, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=generator)
    return x.to(dtype).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NAMES)
def test_names_shapes_and_dtypes_are_torchvision_s(name):
    with torch.device("meta"):
        ours, theirs = build_model(name, num_classes=1000, seed=1).state_dict(), peer(name).state_dict()
    assert [(k, v.shape, v.dtype) for k, v in ours.items()] == [(k, v.shape, v.dtype) for k, v in theirs.items()]


def test_parameters_of_overfeat_are_the_paper_s():
    """Table 1 has 146 million."""
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model("overfeat", num_classes=1000, seed=1).parameters())
    assert round(count / 1e6) == 146


def test_the_original_alexnet_sees_227_pixels_without_padding():
    """As the paper and nvcnn_hvd.py: 55 x 55 behind the first convolution, 6 x 6 before the hidden layers."""
    with torch.device("meta"):
        features = build_model("alexnet", num_classes=1000, seed=1).features
        x = torch.empty(2, 3, 227, 227)
        assert features[0](x).shape == (2, 64, 55, 55)
        assert features(x).shape == (2, 256, 6, 6)


@pytest.mark.parametrize(
    ("name", "size", "algorithm"),
    [
        ("vgg11", 32, "mixed"),
        ("vgg16", 32, "triton"),
        ("alexnet", 95, "mixed"),
        ("overfeat", 231, "mixed"),
    ],
)
def test_computes_what_the_peer_computes(name, size, algorithm):
    """In evaluation there is no gradient: of these models that is all that is different."""
    ours, theirs = pair(name, torch.float64, algorithm)
    x = images(name, torch.float64, size)
    mine, its = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.clone().requires_grad_()
    actual, expected = ours(mine), theirs(its)
    assert relative_error(actual, expected) < 1e-12
    direction = torch.randn_like(expected)
    actual.backward(direction)
    expected.backward(direction)
    assert relative_error(mine.grad, its.grad) < 1e-9
    gradients = dict(theirs.named_parameters())
    for key, p in ours.named_parameters():
        assert relative_error(p.grad, gradients[key].grad) < 1e-9, key
    with torch.no_grad():
        assert relative_error(ours.eval()(x), expected) < 1e-12


def kept_by(model: nn.Module, size: int) -> float:
    with torch.device("meta"):
        return activation_bytes(model, 64, size, torch.float16) / 64 / 1e6


def test_keeps_no_more_than_torchvision():
    """Megabytes that an image of 224 x 224 keeps for backward in fp16."""
    with torch.device("meta"):
        ours, theirs = build_model("vgg16", num_classes=1000, seed=1), peer("vgg16").half()
    for algorithm in ALGORITHMS:
        assert kept_by(choose(ours, algorithm), MODELS["vgg16"].image_size) <= kept_by(theirs, 224)
