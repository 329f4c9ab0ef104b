"""The layers every model is made of.

Activations are in the compute dtype (fp32, fp16, bf16), channels-last. Parameters of two or more dimensions are in the
compute dtype too; gamma, beta and biases stay fp32, and so do their gradients, which are sums over N, H, W.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels.norm_rows import RSTD, SCALE
from nvcnn.program import InputError


class AddBias(torch.autograd.Function):
    """y + bias, in place on y: (N, C, ...) in fp16 or bf16, bias: (C,) fp32, whose gradient is summed in fp32.

    Left to autograd, the sum would be rounded to y's dtype, where 1 000 gradients of 100 are an infinity in fp16. The
    bias itself is rounded to y's dtype, as torch.autocast does: adding two dtypes is slow on a CPU.
    """

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        return y.add_(bias.to(y.dtype).view(-1, *[1] * (y.dim() - 2)))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.sum([d for d in range(grad.dim()) if d != 1], dtype=torch.float32)


class Conv2d(nn.Conv2d):
    """nn.Conv2d whose bias, if any, may be fp32 under fp16 or bf16 weights. (N, C_in, H, W) -> (N, C_out, H', W').

    Where C_in is 3, x may have more channels that are all zero, as tensor cores want them. `algorithm`: how `conv_bn`
    and `conv_relu` compute it. `unit_norm`: (5, C_out), the `norm` that changes no value.
    """

    algorithm = "torch"
    unit_norm: Tensor

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        norm = torch.zeros(5, self.out_channels)
        norm[[SCALE.value, RSTD.value]] = 1
        self.register_buffer("unit_norm", norm, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_for(x)
        if self.bias is None or self.bias.dtype == x.dtype:
            return self._conv_forward(x, weight, self.bias)
        return AddBias.apply(self._conv_forward(x, weight, None), self.bias)

    def weight_for(self, x: Tensor) -> Tensor:
        """Returns the weight, with zeros for the channels that pad images of three."""
        if self.in_channels != 3 or x.shape[1] not in (4, 8):
            return self.weight
        return F.pad(self.weight, (0, 0, 0, 0, 0, x.shape[1] - 3))


def image_channels(model: nn.Module, device: torch.device) -> int:
    """Returns how many channels a model's images have on a device: 3, or 4, of which the last is zero.

    Tensor cores want four. A model whose `takes_padded_images` is true has a `Conv2d` that pads its weight to match.
    """
    return 4 if getattr(model, "takes_padded_images", False) and device.type != "cpu" else 3


def outputs(of_model: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns what a model returned as a tuple: its logits and, in training, those of its auxiliary heads."""
    return of_model if isinstance(of_model, tuple) else (of_model,)


class Linear(nn.Linear):
    """nn.Linear whose bias may be fp32 under fp16 or bf16 weights. (N, in) -> (N, out)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.bias.dtype == x.dtype:
            return super().forward(x)
        return AddBias.apply(F.linear(x, self.weight), self.bias)


class Classifier(nn.Linear):
    """The last layer: (N, in) in the compute dtype -> logits (N, num_classes) in the bias's fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).to(self.bias.dtype) + self.bias


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, fused with what follows it; its running statistics wait for the optimizer.

    relu(normalised x + residual), both optional, (N, C, H, W) -> the same, channels-last. Training normalises with the
    batch's statistics and writes them to `batch_mean` and `batch_var` (unbiased), fp32 of shape (C,). The optimizer's
    update folds them into `running_mean` and `running_var` if the step was finite, and sets them to zero either way.
    Evaluation uses the running ones, and so does training where it is `frozen`. `momentum` is 1 - decay.
    """

    frozen = False

    running_mean: Tensor
    running_var: Tensor
    batch_mean: Tensor
    batch_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-4, momentum: float = 0.1):
        super().__init__(channels, eps, momentum)
        self.register_buffer("batch_mean", torch.zeros(channels), persistent=False)
        self.register_buffer("batch_var", torch.zeros(channels), persistent=False)

    def train(self, mode: bool = True) -> "BatchNorm2d":
        return super().train(mode and not self.frozen)

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        return kernels.batch_norm(x, self.weight, self.bias, self.norm_of(x), residual, relu, self.training)

    @torch.no_grad()
    def norm_of(self, x: Tensor) -> Tensor:
        """Returns the `norm` of x, outside of autograd: the gradient through the statistics is `batch_norm`'s."""
        gamma, beta = self.weight, self.bias
        if self.training:
            return kernels.batch_norm_statistics(x, gamma, beta, self.batch_mean, self.batch_var, self.eps)
        return kernels.norm_of(self.running_mean, self.running_var, gamma, beta, self.eps)


def freeze_backbone(model: nn.Module) -> None:
    """Lets all parameters but those of Classifiers, and all running statistics, stay as they are in training."""
    trained = {id(p) for m in model.modules() if isinstance(m, Classifier) for p in m.parameters()}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.frozen = True
            module.train(module.training)


def flatten(x: Tensor) -> Tensor:
    """Returns x, (N, C, H, W), as (N, H * W * C): a view where it is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1)


def adaptive_average(x: Tensor, size: int) -> Tensor:
    """Returns x, (N, C, H, W), as the means of size x size regions: x itself where it has that size."""
    return x if x.shape[2:] == (size, size) else F.adaptive_avg_pool2d(x, size)


def check_size(model: str, x: Tensor, size: int) -> None:
    """Raises InputError unless x is (N, 3 or 4, size, size): for models whose first Linear fixes the size of images."""
    if x.shape[1] not in (3, 4) or x.shape[2:] != (size, size):
        raise InputError(f"--model={model} takes images of 3 x {size} x {size} (C x H x W), got {tuple(x.shape[1:])}")


def cast_matrices(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts parameters of two or more dimensions to `dtype`, four-dimensional ones channels-last; in place.

    Gamma, beta, biases and all buffers keep their dtype. For evaluation: training has the arena. Returns `model`.
    """
    for p in model.parameters():
        if p.dim() >= 2:
            p.data = p.data.to(dtype, memory_format=torch.channels_last if p.dim() == 4 else torch.preserve_format)
    return model
