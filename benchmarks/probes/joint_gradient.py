"""Are data and weight gradient of a 1 x 1 convolution from 256 to 64 channels worth one kernel, written in Gluon?

    dy = scale g + (slope y + offset), rounded;   dx = dy W where a > 0;   dw = dy^T a;   a = relu(x scale + shift)
g, y and x are read once for both, and dy is formed once; dw and the sums of `gradients` stay in registers until the
end of a program. Triton cannot do this: it maps once for each layout, and spills. g, y, x and dx are moved once, 1028
MB at 56 x 56.

One warp, the producer, moves tiles of rows by TMA into a ring of STAGES; eight, the consumers, compute. They wait for
these barriers:
    full[s]   takes 1 arrival and the bytes of g, y and x: the producer announces them, and TMA completes it. Consumers
              wait for the phase of the ring's turn before they read stage s.
    empty[s]  takes 1 arrival, that of the consumers, after both products have read stage s. The producer waits for the
              phase before its own, which passes at once in the ring's first turn.
    loaded    takes 1 arrival and the bytes of the weight, before the warps part.
Consumers write dy (in place of g) and a to shared memory by ordinary stores, and wgmma reads them by another proxy.
So a fence and then a barrier come before the products. There is one `activation` and one `result`. They are overwritten
after the barrier that ends a turn, when no product is in flight and all have read their rows.
"""

from functools import partial

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benchmarks.probes import IMAGES, Contender, Probe, divides, errors, processors, small_rows
from benchmarks.probes.gradients import Operands, operands, reference
from benchmarks.probes.present import library_gradients, present, summed

K, C, SIZE = 256, 64, 56
BLOCK_ROWS, STAGES = 64, 2
OURS = "one Gluon kernel"
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name up to Triton 3.6
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name up to Triton 3.8


@gluon.jit
def fma(x, scale, shift):
    """Returns what `halves.fma` does. It is here since Gluon calls no function of Triton's."""
    asm: gl.constexpr = "fma.rn.f16x2 $0, $1, $2, $3;"
    return gl.inline_asm_elementwise(asm, "=r,r,r,r", [x, scale, shift], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def fma_relu(x, scale, shift):
    asm: gl.constexpr = "fma.rn.relu.f16x2 $0, $1, $2, $3;"
    return gl.inline_asm_elementwise(asm, "=r,r,r,r", [x, scale, shift], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def where_positive(g, a):
    asm: gl.constexpr = "{ .reg .b32 m, zero; mov.b32 zero, 0; set.gtu.u32.f16x2 m, $2, zero; and.b32 $0, $1, m; }"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [g, a], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def produce(g, y, x, ring, tiles):
    """Loads the program's tiles, as stages of the ring become empty."""
    g_ring, y_ring, x_ring, full, empty = ring
    STAGES: gl.constexpr = g_ring.shape[0]
    BLOCK_ROWS: gl.constexpr = g_ring.shape[1]
    for turn in range(gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))):
        tile = gl.program_id(0) + turn * gl.num_programs(0)
        stage, phase = turn % STAGES, turn // STAGES & 1
        mbarrier.wait(empty.index(stage), phase ^ 1)
        ready = full.index(stage)
        mbarrier.expect(ready, g.block_type.nbytes + y.block_type.nbytes + x.block_type.nbytes)
        load_tile(g, [tile * BLOCK_ROWS, 0], ready, g_ring.index(stage))
        load_tile(y, [tile * BLOCK_ROWS, 0], ready, y_ring.index(stage))
        load_tile(x, [tile * BLOCK_ROWS, 0], ready, x_ring.index(stage))


@gluon.jit
def consume(ring, memory, factors, x_norm, d_norm, dx, dw, sums, tiles):
    """Computes the program's tiles; at the end stores its part of dw and of the sums."""
    g_ring, y_ring, x_ring, full, empty = ring
    activation, result, w = memory
    STAGES: gl.constexpr = g_ring.shape[0]
    BLOCK_ROWS: gl.constexpr = g_ring.shape[1]
    K: gl.constexpr = w.shape[0]
    C: gl.constexpr = w.shape[1]
    # A thread's columns are the same in all its rows, so that it holds few values of the vectors.
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    of_dw: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, C, 16])
    of_dx: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    k = gl.arange(0, K, gl.SliceLayout(0, wide))
    c = gl.arange(0, C, gl.SliceLayout(0, narrow))
    row = gl.arange(0, BLOCK_ROWS, gl.SliceLayout(1, narrow))
    scale, slope = gl.load(factors + k)[None, :], gl.load(factors + K + k)[None, :]
    offset = gl.load(factors + 2 * K + k)[None, :]
    x_scale, x_shift = gl.load(x_norm + c)[None, :], gl.load(x_norm + C + c)[None, :]
    d_scale, d_shift = gl.load(d_norm + c)[None, :], gl.load(d_norm + C + c)[None, :]
    total_dw = gl.zeros([K, C], gl.float32, of_dw)
    total = gl.zeros([BLOCK_ROWS, C], gl.float32, narrow)
    products = gl.zeros([BLOCK_ROWS, C], gl.float32, narrow)
    for turn in range(gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))):
        tile = gl.program_id(0) + turn * gl.num_programs(0)
        stage, phase = turn % STAGES, turn // STAGES & 1
        dy, y_tile, x_tile = g_ring.index(stage), y_ring.index(stage), x_ring.index(stage)
        mbarrier.wait(full.index(stage), phase)
        # Prologue: dy takes the place of g, and a is formed.
        map_y = y_tile.load(wide).to(gl.float32) * slope + offset
        dy.store((dy.load(wide).to(gl.float32) * scale + map_y).to(gl.float16))
        raw = x_tile.load(narrow)
        a = fma_relu(raw, x_scale, x_shift)
        activation.store(a)
        fence_async_shared()
        barrier()
        # Products: dx is waited for alone, so that its epilogue runs while dw is summed.
        product = warpgroup_mma(dy, w, gl.zeros([BLOCK_ROWS, C], gl.float32, of_dx), is_async=True)
        summing = warpgroup_mma(dy.permute([1, 0]), activation, total_dw, is_async=True)
        product = warpgroup_mma_wait(1, [product])
        # Epilogue: the product's layout becomes rows of 16 bytes a thread; then come the mask, dx, and its sums.
        result.store(product.to(gl.float16))
        barrier()
        out = where_positive(result.load(narrow), a)
        gl.store(dx + tile.to(gl.int64) * BLOCK_ROWS * C + (row[:, None] * C + c[None, :]), out)
        wide_out = out.to(gl.float32)
        total += wide_out
        products += wide_out * fma(raw, d_scale, d_shift).to(gl.float32)
        total_dw = warpgroup_mma_wait(0, [summing])
        barrier()
        mbarrier.arrive(empty.index(stage))
    program, programs = gl.program_id(0), gl.num_programs(0)
    at_k = gl.arange(0, K, gl.SliceLayout(1, of_dw))
    at_c = gl.arange(0, C, gl.SliceLayout(0, of_dw))
    gl.store(dw + program * K * C + (at_k[:, None] * C + at_c[None, :]), total_dw)
    gl.store(sums + program * C + c, gl.sum(total, 0))
    gl.store(sums + (programs + program) * C + c, gl.sum(products, 0))


@gluon.jit(do_not_specialize=["tiles"])
def joint_gradient(
    g,
    y,
    x,
    weight,
    factors,
    x_norm,
    d_norm,
    dx,
    dw,
    sums,
    tiles,
    STAGES: gl.constexpr,
):
    """One of n programs computes every n-th tile of rows: whole rows of dx, and one part of dw."""
    BLOCK_ROWS: gl.constexpr = g.block_type.shape[0]
    K: gl.constexpr = weight.block_type.shape[0]
    C: gl.constexpr = weight.block_type.shape[1]
    g_ring = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_ROWS, K], g.layout)
    y_ring = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_ROWS, K], y.layout)
    x_ring = gl.allocate_shared_memory(gl.float16, [STAGES, BLOCK_ROWS, C], x.layout)
    activation = gl.allocate_shared_memory(gl.float16, [BLOCK_ROWS, C], x.layout)
    result = gl.allocate_shared_memory(gl.float16, [BLOCK_ROWS, C], x.layout)
    w = gl.allocate_shared_memory(gl.float16, [K, C], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    fence_async_shared()  # so that the barriers are there before TMA completes them
    barrier()
    mbarrier.expect(loaded, weight.block_type.nbytes)
    load_tile(weight, [0, 0], loaded, w)
    mbarrier.wait(loaded, 0)
    ring, memory = (g_ring, y_ring, x_ring, full, empty), (activation, result, w)
    gl.warp_specialize(
        [
            (consume, (ring, memory, factors, x_norm, d_norm, dx, dw, sums, tiles)),
            (produce, (g, y, x, ring, tiles)),
        ],
        [1],  # the producer's warps
        [24],  # and registers a thread
    )


def launch(of: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, (rows, C), dw, (K, C), fp32, and sums, (2, P, C), fp32."""
    rows, k, c = of.sizes
    tiles = divides(BLOCK_ROWS, rows)
    programs = min(tiles, processors(of.g.device))
    dx, partial_dw = torch.empty_like(of.x), torch.empty(programs, k, c, device=of.g.device)
    sums = torch.empty(2, programs, c, device=of.g.device)
    tiles_of = [
        TensorDescriptor.from_tensor(matrix, [block, matrix.shape[1]], LAYOUT)
        for matrix, block in ((of.g, BLOCK_ROWS), (of.y, BLOCK_ROWS), (of.x, BLOCK_ROWS), (of.weight, k))
    ]
    joint_gradient[(programs,)](
        *(*tiles_of, of.factors, of.x_norm, of.d_norm, dx, partial_dw, sums, tiles),
        STAGES=STAGES,
        num_warps=8,
    )
    return dx, summed(partial_dw), sums


def check(device: torch.device) -> dict[str, float]:
    of = operands(small_rows(device), K, C, device)
    true_dx, true_dw, true_sums = reference(of)
    dx, dw, sums = launch(of)
    return errors(dx=(dx, true_dx), dw=(dw, true_dw), sums=(sums.sum(1), true_sums))


def contenders(device: torch.device) -> dict[str, Contender]:
    rows = IMAGES * SIZE * SIZE
    of = operands(rows, K, C, device)
    images, of_weight = of.present(SIZE), of.present_weight(SIZE)

    def separate() -> None:
        present("convolution_data_gradient")(**images)
        present("convolution_weight_gradient")(**of_weight)

    library = library_gradients(images["g"], images["x"], images["weight"], of_weight=True)
    flops = 4 * rows * K * C
    return {
        OURS: Contender(partial(launch, of), 2 * rows * (2 * K + 2 * C), flops),
        "present": Contender(separate, 2 * rows * (4 * K + 3 * C), flops),
        "cuDNN, gradients alone": Contender(library, 2 * rows * (2 * K + 2 * C), flops),
    }


def verdict(us: dict[str, float], factor: float) -> str:
    time = us[OURS] * factor
    if time <= 480:
        return "adopt it, and write the others"
    return "two consumer groups" if time <= 650 else "stay with separate kernels"


PROBE = Probe(
    name="joint_gradient",
    question="data and weight gradient 1 x 1, 256 to 64 channels at 56 x 56, in one Gluon kernel: right, and fast?",
    threshold="up to 480 us adopt; up to 650 two consumer groups",
    seconds=6,
    tolerance=2e-3,
    check=check,
    contenders=contenders,
    verdict=verdict,
)
