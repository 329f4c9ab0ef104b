"""How a kernel is launched (block sizes, warps): looked up in a table for the GPU, or computed.

kernels/configs/GPU.json, which `make tune` writes on that GPU, is {op: {key: {"BLOCK_C": 64, "num_warps": 4, ...}}}. An
op's key names every dimension its best configuration depends on. What is not in the table, the op computes from the
shape; that is said once. `test.json` has one small configuration an op, under the key "*", for Triton's interpreter
and for tests: small enough that small tensors have several blocks and ragged ends.
"""

import json
import re
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

TABLES = Path(__file__).parent / "configs"
TEST = "test"
SMS = 132  # of a H100

Configuration = Mapping[str, int]


def cdiv(a: int, b: int) -> int:
    """Returns a / b, rounded up. (Triton's own goes through a wrapper that takes as long as half a launch.)"""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Returns the least power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


answers: dict[tuple[str, str], Configuration] = {}  # what each (op, key) was launched with last: `make tune` asks


@cache
def table_name(device: torch.device) -> str:
    """Returns the name of the table for tensors on `device`: the GPU's own, or on a CPU, for the interpreter, TEST.

    Tensors without memory stand for those of the GPU that is here; where there is none, for a GPU without a table: "".
    """
    if device.type == "cpu":
        return TEST
    if device.type == "meta" and not torch.cuda.is_available():
        return ""
    return re.sub(r"\W+", "-", torch.cuda.get_device_name(device if device.type == "cuda" else None)).lower()


@cache
def capability(device: torch.device) -> int:
    """Returns the major compute capability of the GPU; a H100's, 9, for tensors without memory."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@cache
def read_table(name: str) -> dict[str, dict[str, Configuration]]:
    """Returns the table of that name; an empty one if there is none."""
    file = TABLES / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


@cache
def say_once(line: str) -> None:
    warnings.warn(line, stacklevel=3)


def configuration(op: str, key: str, device: torch.device, computed: Configuration) -> Configuration:
    """Returns the configuration of `op` on `device`: the table's for `key`, or for "*", or else `computed`."""
    name = table_name(device)
    table = read_table(name)
    found = table.get(op, {})
    answer = found.get(key) or found.get("*")
    if answer is None:
        answer = computed
    if answer is computed and name:
        missing = f"kernels/configs/{name}.json lacks some calls" if table else f"no kernels/configs/{name}.json"
        say_once(f"{missing}: computed launch configurations are used; `make tune` measures better ones")
    answers[op, key] = answer
    return answer


def dtype_name(dtype: torch.dtype) -> str:
    """Returns fp16, bf16, fp32 or fp64, the names in keys and tables."""
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]
