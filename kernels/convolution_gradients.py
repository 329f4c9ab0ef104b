"""dx and dw of a 1 x 1 convolution, and the sums behind dx, in one kernel for Hopper: what both read is moved once.

    dy = scale g + factors[0] (y - mean) + factors[1], rounded                              (prologue)
    dw = dy^T a,   where a = relu((x - mean) scale + shift), rounded, or x itself, which is rectified
    dx = dy W + skip, times the mask of relu, and sums of it and of its product with x - mean    (epilogue)
That is `convolution_data_gradient` and `convolution_weight_gradient` in this order of operations and roundings, and
their references are this op's. dw and the sums stay in registers until the end of a program, so K x C is 256 x 64 or
64 x 256. Triton cannot do this: it forms dy once for each layout, and spills. So the kernel is written in Gluon, which
no interpreter runs.

Bytes per fp16 value: 2 for each of g, y, x, skip and dx. Parts write and read 4 per value of dw each.

One warp, the producer, moves tiles of rows by TMA into a ring of STAGES; eight, the consumers, compute. TMA and the
matrix units reach shared memory by another way, the async proxy, than loads and stores do. What orders them:
    full[s]   takes 1 arrival and the bytes of a stage's tiles: the producer announces them, and TMA completes it. Rows
              outside are written as 0, and count. Consumers wait for the phase of the ring's turn before they read
              stage s, by either way.
    empty[s]  takes 1 arrival, that of the consumers, at the end of a turn of theirs. The producer waits for the phase
              before its own, which passes at once in the ring's first turn.
    loaded    takes 1 arrival and the bytes of the weight. All warps wait for it before they part.
A turn of the consumers has three barriers of their own, of which the producer is no part:
    1. behind the prologue, which stores a, and dy in place of g, where a thread overwrites what it has read itself.
       Each thread fences its stores before it, and the products start behind it: they read what all threads stored.
    2. behind the product of dx, which is stored in place of skip, where that is given, and where a warp overwrites what
       it has read itself. The epilogue reads it by rows, as other threads stored it.
    3. at the end, when each thread has waited for its products, and read what it reads. A fence before it puts the
       stores in place of g and skip before what TMA will write there. Then empty[s] is told.
`activation` and `result`, of which there is one each, are overwritten behind 3, when nobody reads them.
"""

from hashlib import sha256

import torch
import triton
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

from kernels import configurations, conv_shape
from kernels.checks import check_images, check_like, check_tensors, check_weight, empty_images, single_or_double
from kernels.configurations import SMS, Configuration, cdiv, configuration, dtype_name
from kernels.convolution_data_gradient import reference as data_gradient_reference
from kernels.convolution_weight_gradient import reference as weight_gradient_reference
from kernels.implementation import runs_gluon
from kernels.launch import launch, state
from kernels.norm_rows import MEAN, SCALE, SHIFT
from kernels.operators import named, operator
from kernels.partial_sums import empty_sums, store_sum

OP = "convolution_gradients"
CHANNELS = ((256, 64), (64, 256))  # K, C whose dw fits in the registers of eight warps
# A bottleneck's last convolution, and its first: K, C, whether x is rectified, whether there is a skip.
USES = ((256, 64, False, False), (64, 256, True, True))
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name up to Triton 3.6
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name up to Triton 3.8


def reference(g, x, weight, out, y, norm, factors, x_norm, rectified, skip):
    """Stores dw; returns dx and sums in plain PyTorch. Arguments as in `convolution_gradients`."""
    how, prologue = ([1, 1], [0, 0], 1), (y, norm, factors)
    weight_gradient_reference(g, x, out, *how, *prologue, None if rectified else x_norm)
    epilogue = skip, None, x, x_norm, None, None, None, None, None, 1
    dx, sums, _ = data_gradient_reference(g, weight, x.shape[2:], *how, *prologue, *epilogue)
    return dx, sums


@gluon.jit
def produce(g, y, x, skip, ring, tiles):
    """Loads the program's tiles, as stages of the ring become empty."""
    g_ring, y_ring, x_ring, results, full, empty = ring
    STAGES: gl.constexpr = g_ring.shape[0]
    BLOCK_ROWS: gl.constexpr = g_ring.shape[1]
    BYTES: gl.constexpr = g.block_type.nbytes + y.block_type.nbytes + x.block_type.nbytes
    for turn in range(gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))):
        first = (gl.program_id(0) + turn * gl.num_programs(0)) * BLOCK_ROWS
        stage, phase = turn % STAGES, turn // STAGES & 1
        mbarrier.wait(empty.index(stage), phase ^ 1)
        ready = full.index(stage)
        if skip is None:
            mbarrier.expect(ready, BYTES)
        else:
            mbarrier.expect(ready, BYTES + x.block_type.nbytes)
            load_tile(skip, [first, 0], ready, results.index(stage))
        load_tile(g, [first, 0], ready, g_ring.index(stage))
        load_tile(y, [first, 0], ready, y_ring.index(stage))
        load_tile(x, [first, 0], ready, x_ring.index(stage))


@gluon.jit
def load_row(norm, ROW: gl.constexpr, c, C: gl.constexpr):
    """Returns a row's values, as one row of a tile."""
    return gl.load(norm + ROW * C + c)[None, :]


@gluon.jit
def load_norm(norm, c, C: gl.constexpr):
    """Returns mean, scale and shift. Each turn loads those of x again, from the L1 cache, as registers are few."""
    return load_row(norm, MEAN, c, C), load_row(norm, SCALE, c, C), load_row(norm, SHIFT, c, C)


@gluon.jit
def consume(ring, memory, rows_of, outputs, rows, tiles, ADDS: gl.constexpr, RECTIFIED: gl.constexpr):
    """Computes the program's tiles; at the end stores its part of dw and of the sums."""
    g_ring, y_ring, x_ring, results, full, empty = ring
    activation, w = memory
    norm, factors, x_norm = rows_of
    dx, dw, sums = outputs
    STAGES: gl.constexpr = g_ring.shape[0]
    BLOCK_ROWS: gl.constexpr = g_ring.shape[1]
    K: gl.constexpr = w.shape[0]
    C: gl.constexpr = w.shape[1]
    # A thread has 16 bytes of a row, and the same columns in all of its rows: it holds few values of the vectors.
    of_k: gl.constexpr = gl.BlockedLayout([1, 8], [256 // K, K // 8], [8, 1], [1, 0])
    of_c: gl.constexpr = gl.BlockedLayout([1, 8], [256 // C, C // 8], [8, 1], [1, 0])
    # Of products a warp has 16 rows, up to 64 at a time. Where four warps have all rows, two groups share out columns.
    of_dx: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    GROUPS: gl.constexpr = 1 if K >= 128 else 2
    of_dw: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8 // GROUPS, GROUPS], [16, C // GROUPS, 16])
    SLICE: gl.constexpr = 2048 // C  # rows of which a thread has one
    k, c = gl.arange(0, K, gl.SliceLayout(0, of_k)), gl.arange(0, C, gl.SliceLayout(0, of_c))
    row_k, row_c = gl.arange(0, BLOCK_ROWS, gl.SliceLayout(1, of_k)), gl.arange(0, BLOCK_ROWS, gl.SliceLayout(1, of_c))
    row = gl.arange(0, SLICE, gl.SliceLayout(1, of_c))
    mean, scale = load_row(norm, MEAN, k, K), load_row(norm, SCALE, k, K)
    slope, offset = load_row(factors, 0, k, K), load_row(factors, 1, k, K)
    total_dw = gl.zeros([K, C], gl.float32, of_dw)
    total = gl.zeros([SLICE, C], gl.float32, of_c)
    products = gl.zeros([SLICE, C], gl.float32, of_c)
    for turn in range(gl.cdiv(tiles - gl.program_id(0), gl.num_programs(0))):
        tile = gl.program_id(0) + turn * gl.num_programs(0)
        stage, phase = turn % STAGES, turn // STAGES & 1
        dy, y_tile, x_tile = g_ring.index(stage), y_ring.index(stage), x_ring.index(stage)
        known = rows - tile * BLOCK_ROWS  # rows of the tile
        mbarrier.wait(full.index(stage), phase)

        # The prologue: dy takes the place of g, and a is formed.
        value = slope * (y_tile.load(of_k).to(gl.float32) - mean) + offset
        value = scale * dy.load(of_k).to(gl.float32) + value
        dy.store(gl.where((row_k < known)[:, None], value, 0.0).to(dy.dtype))
        if RECTIFIED:
            a = x_tile
        else:
            a = activation
            x_mean, x_scale, x_shift = load_norm(x_norm, c, C)
            value = (x_tile.load(of_c).to(gl.float32) - x_mean) * x_scale + x_shift
            inside = (row_c < known)[:, None]
            a.store(gl.where(inside & ~(value <= 0), value, 0.0).to(dy.dtype))  # a NaN stays
        fence_async_shared()
        barrier()

        # Products: dx is waited for alone, so that its epilogue runs while dw is summed.
        product = warpgroup_mma(dy, w, gl.zeros([BLOCK_ROWS, C], gl.float32, of_dx), is_async=True)
        summing = warpgroup_mma(dy.permute([1, 0]), a, total_dw, is_async=True)
        product = warpgroup_mma_wait(1, [product])
        if ADDS:
            result = results.index(stage)
            product += result.load(of_dx).to(gl.float32)
        else:
            result = results.index(0)
        result.store(product.to(dy.dtype))
        barrier()

        # The epilogue, by rows of 16 bytes a thread: the mask, dx, and its sums.
        x_mean, x_scale, x_shift = load_norm(x_norm, c, C)
        for i in gl.static_range(BLOCK_ROWS // SLICE):
            raw = x_tile.slice(i * SLICE, SLICE).load(of_c).to(gl.float32)
            out = result.slice(i * SLICE, SLICE).load(of_c).to(gl.float32)
            inside = (row + i * SLICE < known)[:, None]
            passes = ~((raw - x_mean) * x_scale + x_shift <= 0)  # a NaN lets the gradient pass
            out = gl.where(inside & passes, out, 0.0)
            at = dx + (tile.to(gl.int64) * BLOCK_ROWS + i * SLICE) * C + (row[:, None] * C + c[None, :])
            gl.store(at, out.to(dy.dtype), mask=inside)
            total += out
            products += gl.where(inside, out * (raw - x_mean), 0.0)
        total_dw = warpgroup_mma_wait(0, [summing])
        fence_async_shared()
        barrier()
        mbarrier.arrive(empty.index(stage))

    # Store.
    program, programs = gl.program_id(0), gl.num_programs(0)
    at_k = gl.arange(0, K, gl.SliceLayout(1, of_dw))
    at_c = gl.arange(0, C, gl.SliceLayout(0, of_dw))
    gl.store(dw + program * (K * C) + (at_k[:, None] * C + at_c[None, :]), total_dw)
    gl.store(sums + program * C + c, gl.sum(total, 0))
    gl.store(sums + (programs + program) * C + c, gl.sum(products, 0))


@gluon.jit(do_not_specialize=["rows", "tiles"], repr=named(OP, "K", "C", "skip"))
def kernel(
    # tiles of inputs
    g, y, x, skip, weight,
    # prologue and epilogue
    norm, factors, x_norm,
    # outputs
    dx, dw, sums,
    # sizes
    rows, tiles, K: gl.constexpr, C: gl.constexpr,
    # what a is, and tiles
    RECTIFIED: gl.constexpr, BLOCK_ROWS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One of n programs computes every n-th tile of rows: whole rows of dx, and one part of dw."""
    dtype: gl.constexpr = g.dtype
    ADDS: gl.constexpr = skip is not None
    g_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_ROWS, K], g.layout)
    y_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_ROWS, K], g.layout)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_ROWS, C], g.layout)
    results = gl.allocate_shared_memory(dtype, [STAGES if ADDS else 1, BLOCK_ROWS, C], g.layout)
    w = gl.allocate_shared_memory(dtype, [K, C], g.layout)
    activation = w  # stands for none
    if not RECTIFIED:
        activation = gl.allocate_shared_memory(dtype, [BLOCK_ROWS, C], g.layout)
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
    ring, memory = (g_ring, y_ring, x_ring, results, full, empty), (activation, w)
    rows_of, outputs = (norm, factors, x_norm), (dx, dw, sums)
    gl.warp_specialize(
        [
            (consume, (ring, memory, rows_of, outputs, rows, tiles, ADDS, RECTIFIED)),
            (produce, (g, y, x, skip, ring, tiles)),
        ],
        [1],  # the producer's warps
        [24],  # and registers a thread
    )


SOURCE = sha256("".join(part.src for part in (load_row, load_norm, produce, consume, kernel)).encode()).hexdigest()[:8]
COMPUTED: Configuration = {"BLOCK_ROWS": 64, "STAGES": 2, "PROGRAMS": SMS}


def table_key(dtype: torch.dtype, k: int, c: int, rectified: bool, adds: bool) -> str:
    """Returns the key of the table of configurations: all that is compiled in, what is compiled, and by what."""
    words = f"{dtype_name(dtype)} K={k} C={c}" + " rectified" * rectified + " skip" * adds
    return f"{words} kernel={SOURCE} triton={triton.__version__}"


def passed(dtype: torch.dtype, k: int, c: int, rectified: bool, adds: bool, device: torch.device) -> bool:
    """Returns whether `make tune` has found the kernel right on this GPU: its table then has a configuration of it."""
    table = configurations.read_table(configurations.table_name(device))
    return table_key(dtype, k, c, rectified, adds) in table.get(OP, {})


def fits(k: int, c: int, dtype: torch.dtype) -> bool:
    """Returns whether the kernel takes so many channels of g and of x, in that dtype."""
    return (k, c) in CHANNELS and dtype in (torch.float16, torch.bfloat16)


def check_kernel(shape: conv_shape.ConvShape, loaded: list[Tensor]) -> None:
    """Raises ValueError, which says why, where the kernel cannot run. loaded: by TMA."""
    gpu, dtype = conv_shape.capability(loaded[0].device), loaded[0].dtype
    if gpu != 9:
        raise ValueError(f"{OP}: it is for Hopper, compute capability 9; this GPU has {gpu}")
    if not fits(shape.k, shape.c, dtype):
        pairs = " or ".join(f"{k} and {c}" for k, c in CHANNELS)
        raise ValueError(f"{OP}: fp16 or bf16, {pairs} channels of g and x; got {dtype}, {shape.k} and {shape.c}")
    if shape.rows >= 2**31:
        raise ValueError(f"{OP}: under 2^31 pixels; got {shape.rows}")
    if not state.silent and any(tensor.data_ptr() % 16 for tensor in loaded):
        raise ValueError(f"{OP}: TMA loads tensors that begin at a multiple of 16 bytes")


def tiles_of(tensor: Tensor | None, block_rows: int) -> TensorDescriptor | None:
    """Returns the descriptor by which TMA loads so many rows of (rows, channels), as a channels-last tensor lies."""
    if tensor is None or state.silent:
        return None
    channels = tensor.shape[1]
    return TensorDescriptor(
        tensor, [tensor.numel() // channels, channels], [channels, 1], [block_rows, channels], LAYOUT
    )


@operator(OP, mutates_args=("out",))
def convolution_gradients(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    y: Tensor,
    norm: Tensor,
    factors: Tensor,
    x_norm: Tensor,
    rectified: bool = False,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Stores dw in `out`; returns dx and sums, of a 1 x 1 convolution with stride 1, without padding and groups.

    g: (N, K, H, W), fp16 or bf16, channels-last. x: (N, C, H, W), like g. weight: (K, C, 1, 1), like g. out: like the
    weight, of its dtype or fp32. y, norm, factors: dy of g. x_norm: (5, C), fp32; the mask is that of the normalised
    x. All of this and sums as in `convolution_data_gradient`.
    What was convolved is relu of the normalised x, or where x is `rectified`, x itself; dx may then have a skip, like
    x, added.
    Raises ValueError for other layouts, shapes, dtypes or devices, and where the kernel cannot run.
    """
    check_images(OP, "g", g)
    check_weight(OP, "weight", weight, (g.dtype,), g.device)
    check_weight(OP, "out", out, tuple({g.dtype: 0, torch.float32: 0}), g.device)
    shape = conv_shape.conv_shape(OP, check_images(OP, "x", x), weight, (1, 1), (0, 0), 1)
    if weight.shape[2:] != (1, 1) or out.shape != weight.shape:
        raise ValueError(f"{OP}: weight and out are (K, C, 1, 1); got {tuple(weight.shape)} and {tuple(out.shape)}")
    if g.shape != shape.output or x.dtype != g.dtype or x.device != g.device:
        raise ValueError(
            f"{OP}: of that x and weight, g must be {shape.output}, {x.dtype}, on {x.device}; "
            f"got {tuple(g.shape)}, {g.dtype}, on {g.device}"
        )
    check_like(OP, g, y=y)
    check_like(OP, x, skip=skip)
    rows = {"norm": (norm, (5, shape.k)), "factors": (factors, (2, shape.k)), "x_norm": (x_norm, (5, shape.c))}
    check_tensors(OP, g.device, single_or_double(g), **rows)
    if skip is not None and not rectified:
        raise ValueError(f"{OP}: skip is for an x that is rectified")
    if not runs_gluon(g.device):
        return reference(g, x, weight, out, y, norm, factors, x_norm, rectified, skip)
    loaded = [g, y, x, weight] if skip is None else [g, y, x, weight, skip]
    check_kernel(shape, loaded)
    key = table_key(g.dtype, shape.k, shape.c, rectified, skip is not None)
    config = dict(configuration(OP, key, g.device, COMPUTED))
    tiles = cdiv(shape.rows, config["BLOCK_ROWS"])
    programs = min(tiles, config.pop("PROGRAMS"))
    dx, sums = empty_images(g, shape.input), empty_sums(g, x, programs, shape.c)
    partial = torch.empty((programs, out.numel()), dtype=torch.float32, device=g.device)
    of_rows = [tiles_of(tensor, config["BLOCK_ROWS"]) for tensor in (g, y, x, skip)]
    launch(
        kernel,
        (programs,),
        *(*of_rows, tiles_of(weight, shape.k), norm, factors, x_norm, dx, partial, sums, shape.rows, tiles),
        *(shape.k, shape.c, rectified),
        **config,
        num_warps=8,
    )
    store_sum(partial, out)
    return dx, sums
