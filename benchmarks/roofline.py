"""Computes the least time of a training step on GPUs that need not be here, from bytes and FLOPs.

python -m benchmarks.roofline [--model resnet50] [--batch 256] [--dtype fp16|bf16] [--json FILE]
                              [--conv triton|triton-materialized|triton-gram|cudnn|torch|plain]

Every call of the step moves the bytes of its tensors and does its FLOPs. Its floor is the bytes over the bandwidth or
the FLOPs over the matrix rate, whichever is longer. No implementation with these calls can take less than the sum of
the floors; fusing calls moves the limit. --conv is the trainer's, where triton has BatchNorms, additions and ReLUs in
the convolutions; plain is the same model as torchvision has it, with all of them apart, and without an optimizer.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import benchmarks.peers  # noqa: F401 (makes torchvision importable)
from benchmarks import report
from benchmarks.timing import shown, significant
from benchmarks.trace import Call, Layout, plain_calls, step_calls
from kernels.configurations import cdiv
from nvcnn.models import ALGORITHMS, MODELS


@dataclass(frozen=True)
class GPU:
    name: str
    bandwidth: float  # bytes a second, read and written
    rate: float  # FLOPs a second of fp16 or bf16 matrix products, without sparsity


GPUS = (
    # These are peaks that nothing reaches, from NVIDIA's data sheets of the A100 80 GB SXM and the HGX B200 (a GPU of
    # eight).
    GPU("A100 (data sheet)", 2.039e12, 312e12),
    GPU("B200 (data sheet)", 8.0e12, 2250e12),
    # These were measured with a copy and a product of random 8192 x 8192 matrices.
    GPU("H100", 3.0e12, 790e12),
    GPU("H200", 4.3e12, 790e12),
)

# How often an argument moves. One that is not listed is read once, and if the schema says that it is mutated, written
# once, too.
MOVES: dict[str, dict[str, int]] = {
    "aten::copy_": {"self": 1},  # written only
    "aten::native_batch_norm": {"input": 2},  # read for the statistics and for y
    "aten::native_batch_norm_backward": {"grad_out": 2, "input": 2},  # read for the sums and for dx
    "aten::max_pool2d_with_indices_backward": {"self": 0},  # the indices say it all
    # Read for the sums and for dx. Where g, the gradient behind the mask, is asked for, the first pass writes it, and
    # the second reads it.
    "nvcnn::batch_norm_backward": {"dy": 2, "x": 2},
    "nvcnn::batch_norm_into": {"y": 1},
    "nvcnn::convolution": {"out": 1},
    "nvcnn::convolution_gradients": {"out": 1},  # written only; sums over parts stay in the L2 cache
    "nvcnn::convolution_weight_gradient": {"out": 1},  # likewise
    "nvcnn::max_pool_into": {"y": 1},
    "nvcnn::gradient_statistics": {"square_sums": 1},
    "nvcnn::larc_update": {"model_weight": 1, "weight_square_sums": 1},
    "nvcnn::refresh": {"model_weight": 1, "weight_square_sums": 1},
}


# These arguments have the shape of the convolution's output ("" is the result itself, or out) and that of its weight.
CONVOLUTIONS = {
    "nvcnn::convolution": ("", "weight"),
    "nvcnn::convolution_data_gradient": ("g", "weight"),
    "nvcnn::convolution_weight_gradient": ("g", "out"),
}


def moved(call: Call) -> Iterator[tuple[Layout, int]]:
    """Yields each tensor that the call must move to or from memory, and how often: as MOVES has it, a result once."""
    moves = MOVES.get(call.name, {})
    if call.name == "nvcnn::max_pool" and call["kernel_size"] == 1:
        moves = {"x": 0}
        yield call.outputs[0], 1  # what is read of x, every stride-th pixel
    for argument in call.op._schema.arguments:
        default = 2 if argument.alias_info is not None and argument.alias_info.is_write else 1
        for value in tree_leaves(call[argument.name], is_leaf=lambda value: isinstance(value, Layout)):
            if isinstance(value, Layout):
                yield value, moves.get(argument.name, default)
    if not any(result.alias_info for result in call.op._schema.returns):  # else they are arguments
        yield from ((result, 1) for result in call.outputs)


def bytes_of(call: Call) -> int:
    return sum(times * tensor.bytes for tensor, times in moved(call))


def flops_of(call: Call) -> int:
    """Returns the FLOPs of a convolution or matrix product, and 0 for anything else."""
    if call.name in CONVOLUTIONS:
        y, weight = CONVOLUTIONS[call.name]
        shape = (call[y or "out"] or call.outputs[0]).shape
        flops = 2 * prod(shape) * prod(call[weight].shape[1:])
        second = call["a"]  # factor of a product, in the data gradient
        return flops if second is None else flops + 2 * prod(shape) // shape[1] * second.shape[1] ** 2
    if call.name == "nvcnn::convolution_gradients":
        return 4 * prod(call["g"].shape) * call["weight"].shape[1]
    if call.name == "nvcnn::gram_matrix":  # symmetric: half of it is computed
        n, c, h, w = call["x"].shape
        return n * cdiv(h, call["stride"][0]) * cdiv(w, call["stride"][1]) * c * (c + 1)
    formula = flop_registry.get(call.op.overloadpacket)
    if formula is None:
        return 0
    shapes = [value.shape if isinstance(value, Layout) else value for _, value in call.arguments]
    out = call.outputs[0].shape
    return formula(*shapes, out_val=[out, out] if "backward" in call.name else out)


def name_of(call: Call) -> str:
    if call.name == "aten::convolution_backward":
        return f"{call.name}, {'data' if call['output_mask'][0] else 'weight'}"
    return call.name


def rows_of(calls: Iterable[Call], batch: int) -> list[dict[str, Any]]:
    """Returns a row for each op, the largest first, one for the step, and one for its images/s.

    Floors are in microseconds.
    """
    names = [gpu.name for gpu in GPUS]
    rows: dict[str, dict[str, Any]] = {}
    step: dict[str, Any] = {"name": "step", "calls": 0} | dict.fromkeys(("MB/image", "GFLOP/image", *names), 0.0)
    for call, count in Counter(calls).items():
        moved, flops = bytes_of(call), flops_of(call)
        floors = {gpu.name: max(moved / gpu.bandwidth, flops / gpu.rate) * 1e6 for gpu in GPUS}
        amounts = {"MB/image": moved / batch / 1e6, "GFLOP/image": flops / batch / 1e9} | floors
        row = rows.setdefault(name_of(call), dict.fromkeys(step, 0) | {"name": name_of(call)})
        for total in (row, step):
            total["calls"] += count
            for key, amount in amounts.items():
                total[key] += count * amount
    images = dict.fromkeys(step) | {"name": "images/s at most"} | {name: batch / step[name] * 1e6 for name in names}
    return [*sorted(rows.values(), key=lambda row: -row["MB/image"]), step, images]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=("fp16", "bf16"), default="fp16")
    parser.add_argument("--conv", choices=(*ALGORITHMS, "plain"), default="triton")
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    arguments = parser.parse_args()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[arguments.dtype]
    step = arguments.model, arguments.batch, dtype
    calls = plain_calls(*step) if arguments.conv == "plain" else step_calls(*step, arguments.conv)
    rows = rows_of(calls, arguments.batch)
    if arguments.json:
        report.write(arguments.json, "roofline", rows)
    rounded = [{k: significant(v) if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    print(f"microseconds at least\n{report.table(shown(rounded))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
