"""A model as an ONNX graph, from PyTorch's operators and the project's as torch.export traces them in evaluation.

It takes what decoding leaves, uint8 (N, H, W, 3) in RGB for any N, and normalises it as `prepare_input` does.
"""

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from nvcnn.data.batch import SCALE_SHIFT
from nvcnn.models.layers import BatchNorm2d
from nvcnn.program import InputError

OPSET, IR = 17, 8  # what onnxruntime 1.12 reads already


def batch_norm(bn: BatchNorm2d, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    """Computes what a BatchNorm2d does in evaluation by PyTorch's operators, which ONNX has, too."""
    y = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def traced(model: nn.Module, image_size: int) -> torch.export.ExportedProgram:
    """Returns the model as torch.export has it, for any number of images. The model is not to be used any more."""
    for module in model.eval().modules():
        if isinstance(module, BatchNorm2d):
            module.forward = MethodType(batch_norm, module)  # type: ignore[method-assign]
    x = torch.zeros(2, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("N")},), strict=False)


class Graph:
    """Nodes and constants of a graph in the making. A value is known by its name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(self, kind: str, *inputs: str | None, **attributes: Any) -> str:
        """Adds a node and returns its output."""
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [name or "" for name in inputs], [output], **attributes))
        return output

    def constant(self, value: Any) -> str:
        """Adds an fp32 constant."""
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(value, dtype=np.float32)
        return name

    # What operators become, by their names and with their arguments.

    def conv2d(self, x, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1):
        how = {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
        return self.add("Conv", x, weight, *[bias] * (bias is not None), **how)

    def batch_norm(self, x, weight, bias, mean, var, training, momentum, eps, cudnn):
        return self.add("BatchNormalization", x, weight, bias, mean, var, epsilon=eps)

    def relu(self, x):
        return self.add("Relu", x)

    def add_tensor(self, x, y, alpha=1):
        return self.add("Add", x, y if alpha == 1 else self.add("Mul", y, self.constant(alpha)))

    def max_pool(self, x, kernel_size, stride, padding=0, with_argmax=False, norm=None, ceil_mode=False):
        how = {"kernel_shape": [kernel_size] * 2, "strides": [stride] * 2, "pads": [padding] * 4}
        return self.add("MaxPool", x, **how, ceil_mode=int(ceil_mode)), None

    def avg_pool2d(self, x, kernel_size, stride, padding=(0, 0), ceil_mode=False, count_include_pad=True):
        how = {"kernel_shape": kernel_size, "strides": stride, "pads": [*padding, *padding]}
        return self.add("AveragePool", x, **how, ceil_mode=int(ceil_mode), count_include_pad=int(count_include_pad))

    def global_average(self, x):
        return self.add("Flatten", self.add("GlobalAveragePool", x))

    def adaptive_average(self, x, size: Sequence[int], of: Sequence[int]):
        """Averages rows and columns by a product each: ONNX has no such pooling."""
        rows, columns = (regions(n, before) for n, before in zip(size, of, strict=True))
        return self.add("MatMul", self.constant(rows), self.add("MatMul", x, self.constant(columns.T)))

    def linear(self, x, weight, bias=None):
        return self.add("Gemm", x, weight, *[bias] * (bias is not None), transB=1)

    def cat(self, values, dim=0):
        return self.add("Concat", *values, axis=dim)

    def permute(self, x, order):
        return self.add("Transpose", x, perm=order)

    def flatten(self, x, start=0):
        assert start == 1, "ONNX's Flatten has two dimensions"
        return self.add("Flatten", x)

    def same(self, x, *_, **__):
        return x

    def write(self, program: torch.export.ExportedProgram, x: str) -> str:
        """Adds a traced model that reads x; returns its output. Raises InputError for an operator not in OPERATORS."""
        signature = program.graph_signature
        weights = signature.inputs_to_parameters | signature.inputs_to_buffers
        values: dict[torch.fx.Node, Any] = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = weights.get(node.name, x)
            elif node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                name = str(node.target)
                if name not in OPERATORS:
                    raise InputError(f"--format=onnx: {name} has no nodes; give it some in {__name__}.OPERATORS")
                if name == "aten.adaptive_avg_pool2d.default":
                    kwargs = {"of": node.args[0].meta["val"].shape[2:]}
                values[node] = OPERATORS[name](self, *args, **kwargs)
            elif node.op == "output":
                x = values[node.args[0][0]]
        known = program.state_dict | program.constants
        self.constants |= {name: known[name].detach().numpy() for name in weights.values()}
        return x

    def fold(self) -> None:
        """Lets the convolution before each BatchNormalization do its work, where nobody else reads what is between.

        An average pooling may be between them: the addition then stays behind it.
        """
        readers = Counter(name for node in self.nodes for name in node.input)
        made = {node.output[0]: node for node in self.nodes}
        folded = []
        for i, bn in enumerate(self.nodes):
            if bn.op_type != "BatchNormalization":
                continue
            behind = made[bn.input[0]]
            conv = made.get(behind.input[0], behind) if behind.op_type == "AveragePool" else behind
            alone = readers[behind.output[0]] == readers[conv.output[0]] == 1
            if conv.op_type != "Conv" or len(conv.input) != 2 or not alone:
                continue
            gamma, beta, mean, var = (self.constants[name].astype(np.float64) for name in bn.input[1:])
            scale = gamma / np.sqrt(var + bn.attribute[0].f)
            shift = beta - mean * scale
            conv.input[1] = self.constant(self.constants[conv.input[1]] * scale[:, None, None, None])
            if conv is behind:
                conv.input.append(self.constant(shift))
                conv.output[0] = bn.output[0]
                folded.append(bn)
            else:
                added = [behind.output[0], self.constant(shift[:, None, None])]
                self.nodes[i] = helper.make_node("Add", added, bn.output)
        for bn in folded:
            self.nodes.remove(bn)


OPERATORS: dict[str, Callable[..., Any]] = {
    "aten.conv2d.default": Graph.conv2d,
    "aten.batch_norm.default": Graph.batch_norm,
    "aten.relu.default": Graph.relu,
    "aten.relu_.default": Graph.relu,
    "aten.add.Tensor": Graph.add_tensor,
    "aten.avg_pool2d.default": Graph.avg_pool2d,
    "aten.adaptive_avg_pool2d.default": Graph.adaptive_average,
    "aten.linear.default": Graph.linear,
    "aten.cat.default": Graph.cat,
    "aten.permute.default": Graph.permute,
    "aten.flatten.using_ints": Graph.flatten,
    "aten.dropout.default": Graph.same,
    "aten.to.dtype": Graph.same,
    "aten.contiguous.default": Graph.same,
    "aten._assert_tensor_metadata.default": Graph.same,
    "nvcnn.max_pool.default": Graph.max_pool,
    "nvcnn.global_average.default": Graph.global_average,
    str(operator.getitem): lambda graph, values, i: values[i],
}


def regions(n: int, of: int) -> np.ndarray:
    """Returns the (n, of) matrix whose rows are means of PyTorch's adaptive pooling."""
    means = np.zeros((n, of))
    for i in range(n):
        first, end = i * of // n, -(-(i + 1) * of // n)
        means[i, first:end] = 1 / (end - first)
    return means


def onnx_model(
    model: nn.Module, *, image_size: int, normalize: str, fold: bool, metadata: dict[str, str]
) -> onnx.ModelProto:
    """Returns the model in evaluation, images -> logits. fold: without BatchNormalization behind convolutions.

    The model is not to be used any more.
    """
    graph = Graph()
    x = graph.add("Cast", graph.add("Transpose", "images", perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
    scale, shift = (graph.constant(np.reshape(values, (3, 1, 1))) for values in SCALE_SHIFT[normalize])
    x = graph.write(traced(model, image_size), graph.add("Add", graph.add("Mul", x, scale), shift))
    if fold:
        graph.fold()
    graph.nodes.append(helper.make_node("Identity", [x], ["logits"]))
    used = {name for node in graph.nodes for name in node.input}
    made = helper.make_model(
        helper.make_graph(
            graph.nodes,
            metadata.get("model", "nvcnn"),
            [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", image_size, image_size, 3])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", None])],
            [numpy_helper.from_array(value, name) for name, value in graph.constants.items() if name in used],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="nvcnn",
    )
    helper.set_model_props(made, metadata)
    return made
