"""Times ResNet-50's convolutions, alone and fused, against PyTorch's (on a GPU cuDNN's fastest).

Alone, the forward pass and the gradients of the input and of the weight are timed. Fused, one op computes the
convolution with relu(BatchNorm(x)) or with the join of a block, for which PyTorch needs several; ours takes the
BatchNorm's norm, which its producer made, and makes that of the next BatchNorm. In evaluation one op computes the
convolution with the BatchNorm, addition and ReLU that follow. On a CPU the references run, on the layers of one block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks import peers
from benchmarks.layers import OURS, Contender, Inputs, Layer, comparison, device_and_batch
from nvcnn.meta import Place, places
from nvcnn.models import build_model

EPS = 1e-4
LIBRARY = "cuDNN" if torch.cuda.is_available() else "PyTorch"
Compute = Callable[..., tuple[Tensor, ...]]  # takes the inputs


def resnet50(training: bool) -> dict[str, Place]:
    """Returns the places of its distinct convolutions by name; on a CPU those of one block, on images of 6 x 6."""
    device, dtype, batch = device_and_batch()
    model = build_model("resnet50", num_classes=1000, seed=0).train(training)
    found: dict[Place, str] = {}
    for name, place in places(model, batch, 224, dtype, channels=4).items():
        if device.type == "cuda":
            found.setdefault(place, name)
        elif name.startswith(("layer2.0", "layer2.1")):
            found.setdefault(place._replace(x=(*place.x[:2], 6, 6)), name)
    return {name: place for place, name in found.items()}


def contender(compute: Compute, device: torch.device) -> Contender:
    """Returns a contender that runs `compute` outside of autograd."""

    def run(*inputs: Tensor, backward: bool) -> tuple[Tensor, ...]:
        with torch.no_grad(), peers.cudnn():
            return compute(*inputs)

    return run


def channels_last(*shape: int, device: torch.device, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    x = torch.randn(shape, device=device) * size
    return x.to(dtype, memory_format=torch.channels_last)


def tensors(place: Place, names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> Inputs:
    """Returns the tensors of these names: x, residual, weight, g, `add` (like g), x_norm, residual_norm."""
    n, k = place.x[0], place.weight[0]
    sizes = zip(place.x[2:], place.weight[2:], place.stride, place.padding, strict=True)
    y = n, k, *((size + 2 * padding - taps) // stride + 1 for size, taps, stride, padding in sizes)
    fan_in = place.weight[1] * place.weight[2] * place.weight[3]
    made = {
        "x": channels_last(*place.x, device=device, dtype=dtype),
        "weight": channels_last(*place.weight, device=device, dtype=dtype, size=fan_in**-0.5),
        "g": channels_last(*y, device=device, dtype=dtype),
    }
    if "add" in names:
        made["add"] = channels_last(*y, device=device, dtype=dtype)
    if "residual" in names:
        made["residual"] = channels_last(*place.x, device=device, dtype=dtype)
    for name in ("x", "residual"):
        if f"{name}_norm" in names:
            made[f"{name}_norm"] = norm(made[name])
    return tuple(made[name] for name in names)


def norm(x: Tensor) -> Tensor:
    """Returns the norm, (5, C), fp32, of x in training, with gamma 1 and beta 0."""
    ones, zeros, *written = ones_and_zeros(x.shape[1], x.device)
    return kernels.batch_norm_statistics(x, ones, zeros, *written, EPS)


def ones_and_zeros(channels: int, device: torch.device) -> tuple[Tensor, ...]:
    return torch.ones(channels, device=device), *torch.zeros(3, channels, device=device)


def alone(name: str, place: Place) -> list[Layer]:
    """Returns the layers of the convolution alone: forward, and each gradient that it has."""
    geometry = place.stride, place.padding, place.groups

    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (kernels.convolution(x, weight, *geometry)[0],)

    def library_forward(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (F.conv2d(x, weight, None, place.stride, place.padding, 1, place.groups),)

    def data_gradient(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (kernels.convolution_data_gradient(g, weight, x.shape[2:], *geometry)[0],)

    def weight_gradient(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        dw = torch.empty_like(weight)
        kernels.convolution_weight_gradient(g, x, dw, *geometry)
        return (dw,)

    def library_gradient(g: Tensor, x: Tensor, weight: Tensor, *, of_x: bool) -> tuple[Tensor, ...]:
        how: Any = None, place.stride, place.padding, [1, 1], False, [0, 0], place.groups, [of_x, not of_x, False]
        dx, dw, _ = torch.ops.aten.convolution_backward(g, x, weight, *how)
        return (dx if of_x else dw,)

    of_gradient = ("g", "x", "weight")
    layers = [layer(name, place, "forward", ("x", "weight"), forward, library_forward)]
    if place.gradient:
        library = partial(library_gradient, of_x=True)
        layers.append(layer(name, place, "data gradient", of_gradient, data_gradient, library))
    library = partial(library_gradient, of_x=False)
    return [*layers, layer(name, place, "weight gradient", of_gradient, weight_gradient, library)]


def fused(name: str, place: Place) -> Layer:
    """Returns the layer that convolves relu(BatchNorm(x)) or relu(BatchNorm(x) + residual).

    The residual may need a BatchNorm, too.
    """
    geometry = place.stride, place.padding, place.groups
    words = {"raw": "BatchNorm, ReLU", "join": "BatchNorm, add, ReLU", "join of two": "2 BatchNorms, add, ReLU"}
    every = ("x", "weight", "x_norm", "residual", "residual_norm")
    names = every[: {"raw": 3, "join": 4, "join of two": 5}[place.reads]]

    def ours(x: Tensor, weight: Tensor, *prologue: Tensor) -> tuple[Tensor, ...]:
        ones, center, *written = ones_and_zeros(weight.shape[0], x.device)
        options: list[Any] = [*prologue, None, None][:3]
        y, z, sums = kernels.convolution(x, weight, *geometry, *options, center)
        kernels.norm_from_sums(sums, center, y.numel() // y.shape[1], ones, center, *written, EPS)
        return (y, z) if len(prologue) > 1 else (y,)

    def library(x: Tensor, weight: Tensor, *prologue: Tensor) -> tuple[Tensor, ...]:
        ones, zeros = ones_and_zeros(x.shape[1], x.device)[:2]
        z = F.batch_norm(x, None, None, ones, zeros, True, eps=EPS)
        if len(prologue) > 1:
            b = prologue[1]
            z += b if len(prologue) == 2 else F.batch_norm(b, None, None, ones, zeros, True, eps=EPS)
        y = F.conv2d(z.relu_(), weight, None, place.stride, place.padding, 1, place.groups)
        return (y, z) if len(prologue) > 1 else (y,)

    return layer(name, place, f"{words[place.reads]}, forward", names, ours, library)


def evaluation(name: str, place: Place) -> Layer:
    """Returns the layer that computes relu(BatchNorm(convolution)) or relu(BatchNorm(convolution) + add).

    The running statistics are a mean of 0 and a variance of 1.
    """
    geometry = place.stride, place.padding, place.groups
    adds = place.folded == "folded, adding"

    def ours(x: Tensor, weight: Tensor, *add: Tensor) -> tuple[Tensor, ...]:
        ones, zeros = ones_and_zeros(weight.shape[0], x.device)[:2]
        epilogue: dict[str, Any] = {"scale": ones * (1 + EPS) ** -0.5, "shift": zeros, "relu": True}
        return (kernels.convolution(x, weight, *geometry, add=add[0] if add else None, **epilogue)[0],)

    def library(x: Tensor, weight: Tensor, *add: Tensor) -> tuple[Tensor, ...]:
        ones, zeros = ones_and_zeros(weight.shape[0], x.device)[:2]
        y = F.conv2d(x, weight, None, place.stride, place.padding, 1, place.groups)
        y = F.batch_norm(y, zeros, ones, ones, zeros, False, eps=EPS)
        if add:
            y += add[0]
        return (y.relu_(),)

    words = f"forward, BatchNorm, {'add, ' if adds else ''}ReLU in evaluation"
    return layer(name, place, words, ("x", "weight", "add") if adds else ("x", "weight"), ours, library)


def layer(name: str, place: Place, work: str, names: tuple[str, ...], ours: Compute, library: Compute) -> Layer:
    (_, c, h, _), (k, _, r, s) = place.x, place.weight
    shape = f"{c} x {h} x {h}, {k} x {r} x {s} stride {place.stride[0]}"
    contenders = {OURS: partial(contender, ours), LIBRARY: partial(contender, library)}
    return Layer(f"convolution {name} {shape}", partial(tensors, place, names), contenders, (False,), work)


def layers() -> list[Layer]:
    """Returns the layers alone, once for each geometry; fused, as each place reads its input; and in evaluation."""
    found, seen = [], set()
    for name, place in resnet50(training=True).items():
        geometry = place._replace(reads="")
        if geometry not in seen:
            seen.add(geometry)
            found += alone(name, place)
        if place.reads != "activation":
            found.append(fused(name, place))
    return found + [evaluation(name, place) for name, place in resnet50(training=False).items()]


LAYERS = layers()
test_convolution = comparison(LAYERS)
