"""Products that do not run as they should on Hopper.

python -m tests.kernels.serialised    prints a line for each

The loop of the first may not run at all, which ptxas answers with wgmma that wait for each other: its warnings are
printed. The second runs; wgmma reads an operand from registers, with Triton before 3.7 not in time. The third is
multiplied by `multiply_add`, which mends that.
"""

from unittest import mock

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from benchmarks.codegen import serialised, written_early
from benchmarks.trace import Chip
from kernels.tiles import multiply_add


@triton.jit
def product(a, b, c, steps, LEAST: tl.constexpr, MENDED: tl.constexpr):
    row, column, k = tl.arange(0, 128)[:, None], tl.arange(0, 64)[None, :], tl.arange(0, 32)
    result = tl.zeros((128, 64), tl.float32)
    for step in range(tl.maximum(steps, LEAST)):
        x = tl.load(a + row * 32 + k[None, :] + step * 4096) * 2
        y = tl.load(b + k[:, None] * 64 + column + step * 2048)
        result = multiply_add(x, y, result, True) if MENDED else tl.dot(x, y, result)
    tl.store(c + row * 64 + column, result)


if __name__ == "__main__":
    for least, mended in ((0, False), (1, False), (1, True)):
        signature = {
            "a": "*fp16",
            "b": "*fp16",
            "c": "*fp32",
            "steps": "i32",
            "LEAST": "constexpr",
            "MENDED": "constexpr",
        }
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
        source = ASTSource(product, signature, {"LEAST": least, "MENDED": mended}, aligned)
        target = GPUTarget("cuda", 90, 32)
        with mock.patch.object(driver, "_active", Chip(90)):
            kernel = triton.compile(source, target=target, options={"num_warps": 8, "num_stages": 3})
        print(written_early(kernel.asm["ttgir"]), *serialised(kernel.asm["ptx"]))
