"""A model as an ONNX graph, by PyTorch's exporter.

It takes what decoding leaves, uint8 (N, H, W, 3) in RGB for any N, and normalises it as `prepare_input` does.
"""

import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import opset18, optimizer
from torch import Tensor, nn

import kernels
from nvcnn.data.batch import SCALE_SHIFT
from nvcnn.models.branches import AverageConvBN
from nvcnn.models.fused import Operand, PendingConv, Unnormalized, activation, conv_bn
from nvcnn.models.layers import BatchNorm2d

OPSET = 18  # PyTorch's exporter has no older one; onnxruntime 1.14 reads it


class OnImages(nn.Module):
    """A model behind the normalisation of its images. uint8 (N, H, W, 3) -> logits."""

    def __init__(self, model: nn.Module, normalize: str):
        super().__init__()
        self.model = model
        self.scale, self.shift = (nn.Buffer(torch.tensor(values).view(3, 1, 1)) for values in SCALE_SHIFT[normalize])

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.permute(0, 3, 1, 2).float() * self.scale + self.shift)


def batch_norm(bn: BatchNorm2d, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    """Computes what a BatchNorm2d does in evaluation by PyTorch's operators, which ONNX has, too."""
    y = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def pool_first(layer: AverageConvBN, x: Operand) -> Unnormalized | PendingConv:
    """Computes what an AverageConvBN does, but pools first: the BatchNorm can be folded into what is before it."""
    return conv_bn(layer.average(activation(x)), layer.conv, layer.bn)


def max_pool(x, size, stride, padding, with_argmax, norm=None, ceil_mode=False):
    window = {"kernel_shape": [size] * 2, "strides": [stride] * 2, "pads": [padding] * 4}
    return opset18.MaxPool(x, **window, ceil_mode=int(ceil_mode))


FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {BatchNorm2d: batch_norm, AverageConvBN: pool_first}
NODES: dict[Any, Callable[..., Any]] = {
    kernels.max_pool_with_argmax.overload: max_pool,
    kernels.global_average.overload: lambda x: opset18.Flatten(opset18.GlobalAveragePool(x)),
}


def onnx_model(model: nn.Module, *, image_size: int, normalize: str, fold: bool, metadata: dict[str, str]) -> Any:
    """Returns the ModelProto of the model in evaluation, images -> logits. The model is not to be used any more.

    fold: without BatchNormalization behind convolutions, as the exporter's optimizer has it.
    """
    for module in model.modules():
        if type(module) in FORWARDS:
            module.forward = MethodType(FORWARDS[type(module)], module)
    images = torch.zeros(2, image_size, image_size, 3, dtype=torch.uint8)
    names: Any = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: "N"},)}
    how: Any = {"opset_version": OPSET, "custom_translation_table": NODES, "optimize": fold, "verbose": False}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's, of a function of its own
        program = torch.onnx.export(OnImages(model, normalize).eval(), (images,), dynamo=True, **names, **how)
    assert program is not None
    optimizer.fold_constants(program.model)
    optimizer.remove_unused_nodes(program.model)
    ClearMetadataAndDocStringPass()(program.model)  # which has paths of this machine
    program.model.metadata_props.update(metadata)
    return program.model_proto
