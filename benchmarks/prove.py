"""Finds out whether the kernel of both gradients is right on this GPU, in a process of its own: it could hang there.

python3 -m benchmarks.prove K C DTYPE [--rectified] [--skip]      (`make tune` runs it, for what a model may launch)

Its warps wait for each other at barriers in memory; no test without a GPU shows that they do so rightly. It is compared
with the two kernels that it stands for: on small integers, of which all sums are exact, bit by bit, for few rows and
for several turns of all programs, both with a ragged end; then on random values of ResNet-50's size. A second call must
give the same bits, and what it leaves out would be NaN. Exit code 1: it is wrong, and the last line says where.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from benchmarks.first import poisoned
from benchmarks.replay import difference
from kernels import convolution_data_gradient, convolution_gradients, convolution_weight_gradient

EXACT, WHOLE = ((1, 5, 19), (3, 92, 92)), (256, 56, 56)  # images, height, width
TOLERANCE = 1e-3  # of the norm: twice a rounding to fp16
MASK = 1e-6  # share of values: sums that cancel are 0 or nearly so; other roundings in the mask would change 3e-4
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
GEOMETRY = (1, 1), (0, 0), 1
Results = dict[str, Tensor]


def operands(
    k: int, c: int, rows: tuple[int, int, int], dtype: torch.dtype, device: torch.device, exact: bool
) -> Results:
    """Returns what both gradients take, by their arguments' names; of normal values, or `exact`, of small integers."""
    n, h, w = rows

    def values(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, device=device).float() if exact else torch.randn(shape, device=device)

    def images(channels: int) -> Tensor:
        return values(n, channels, h, w).to(dtype, memory_format=torch.channels_last)

    made = {"g": images(k), "y": images(k), "x": images(c), "skip": images(c)}
    made |= {"norm": values(5, k), "factors": values(2, k), "x_norm": values(5, c)}
    if not exact:
        made["norm"][1].abs_().add_(0.5)
        made["x_norm"][1].abs_().add_(0.5)
    return made | {"weight": values(k, c, 1, 1).to(dtype, memory_format=torch.channels_last)}


def joint(made: Results, rectified: bool, adds: bool) -> Results:
    out = torch.empty_like(made["weight"], dtype=torch.float32)
    through = made["y"], made["norm"], made["factors"], made["x_norm"]
    skip = made["skip"] if adds else None
    dx, sums = convolution_gradients(made["g"], made["x"], made["weight"], out, *through, rectified, skip)
    return {"dx": dx, "dw": out, "sums": sums.double().sum(1)}


def separate(made: Results, rectified: bool, adds: bool) -> Results:
    out = torch.empty_like(made["weight"], dtype=torch.float32)
    through = made["y"], made["norm"], made["factors"]
    x_norm, skip = None if rectified else made["x_norm"], made["skip"] if adds else None
    convolution_weight_gradient(made["g"], made["x"], out, *GEOMETRY, *through, x_norm)
    epilogue = skip, None, made["x"], made["x_norm"]
    size = made["x"].shape[2:]
    dx, sums, _ = convolution_data_gradient(made["g"], made["weight"], size, *GEOMETRY, *through, *epilogue)
    return {"dx": dx, "dw": out, "sums": sums.double().sum(1)}


def fault(k: int, c: int, rectified: bool, adds: bool, dtype: torch.dtype, device: torch.device) -> str:
    """Returns what is wrong with the kernel, or nothing."""
    torch.manual_seed(0)
    for rows in (*EXACT, WHOLE):
        made = operands(k, c, rows, dtype, device, rows is not WHOLE)
        with poisoned():
            ours, again = (joint(made, rectified, adds) for _ in range(2))
        theirs = separate(made, rectified, adds)
        where = " x ".join(map(str, rows))
        for name, result in ours.items():
            if not torch.equal(result, again[name]):
                return f"{name} of {where} has other bits in a second call"
            off = difference(result, theirs[name])
            if not off <= (TOLERANCE * torch.finfo(dtype).eps / 2**-10 if rows is WHOLE else 0):  # a NaN is not
                return f"{name} of {where} is off by {off:.1e} of its norm"
        if (other := difference(ours["dx"] == 0, theirs["dx"] == 0)) > MASK:
            return f"the mask of {where} is another for {other:.1e} of the values"
    return ""


def command(k: int, c: int, rectified: bool, adds: bool, dtype: str) -> list[str]:
    words = ["--rectified"] * rectified + ["--skip"] * adds
    return [sys.executable, "-m", "benchmarks.prove", str(k), str(c), dtype, *words]


def fault_of(command: Sequence[str], seconds: float) -> str:
    """Returns why the process did not end well within so many seconds, in one line; nothing if it did."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)  # the driver has to end a kernel that never ends
        return f"no answer in {seconds:g} s: it hangs"
    if process.returncode == 0:
        return ""
    last = output.strip().splitlines()[-1:] or ["no word"]
    return last[0] if process.returncode == 1 else f"its process ended with {process.returncode}: {last[0]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.prove", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("k", type=int, metavar="K", help="channels of g")
    parser.add_argument("c", type=int, metavar="C", help="channels of x")
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("--rectified", action="store_true", help="x is what was convolved")
    parser.add_argument("--skip", action="store_true", help="one is added")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device here")
    found = fault(asked.k, asked.c, asked.rectified, asked.skip, DTYPES[asked.dtype], torch.device("cuda"))
    print(found or "right")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
