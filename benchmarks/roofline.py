"""Computes the least time of a training step on GPUs that need not be here, from bytes and FLOPs.

python -m benchmarks.roofline [--model resnet50] [--batch 256] [--dtype fp16|bf16] [--json FILE]
                              [--conv triton|triton-materialized|triton-gram|cudnn|torch|plain]

What they are, and what a floor is, `nvcnn.roofline` says. --conv is the trainer's, where triton has BatchNorms,
additions and ReLUs in the convolutions; plain is the same model as torchvision has it, with all of them apart, and
without an optimizer.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

import benchmarks.peers  # noqa: F401 (makes torchvision importable)
from benchmarks import report
from benchmarks.timing import shown, significant
from benchmarks.trace import plain_calls, step_calls
from nvcnn.models import ALGORITHMS, MODELS
from nvcnn.roofline import GPUS, Call, bytes_of, floor, flops_of


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
        floors = {gpu.name: floor(call, gpu) * 1e6 for gpu in GPUS}
        amounts = {"MB/image": bytes_of(call) / batch / 1e6, "GFLOP/image": flops_of(call) / batch / 1e9} | floors
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
