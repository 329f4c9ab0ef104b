"""A product whose loop may not run at all, which ptxas answers with wgmma that wait for each other.

python -m tests.kernels.serialised    prints the warnings, of it and of the same with a loop that runs
"""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.codegen import serialised


@triton.jit
def product(a, b, c, steps, LEAST: tl.constexpr):
    row, column, k = tl.arange(0, 128)[:, None], tl.arange(0, 64)[None, :], tl.arange(0, 32)
    result = tl.zeros((128, 64), tl.float32)
    for step in range(tl.maximum(steps, LEAST)):
        x = tl.load(a + row * 32 + k[None, :] + step * 4096) * 2
        result = tl.dot(x, tl.load(b + k[:, None] * 64 + column + step * 2048), result)
    tl.store(c + row * 64 + column, result)


if __name__ == "__main__":
    for least in (0, 1):
        pointers = {"a": "*fp16", "b": "*fp16", "c": "*fp32"}
        aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
        source = ASTSource(product, {**pointers, "steps": "i32", "LEAST": "constexpr"}, {"LEAST": least}, aligned)
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 3})
        print(*serialised(kernel.asm["ptx"]))
