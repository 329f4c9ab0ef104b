"""The bytes that the roofline charges an op are those its kernels move: counted, address by address."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_iter
from triton.runtime import interpreter

import kernels
from benchmarks import roofline
from benchmarks.trace import evaluation_calls, plain_calls, step_calls
from kernels.blocks import BLOCK
from kernels.configurations import TEST, read_table
from kernels.implementation import INTERPRETED
from nvcnn.roofline import GPUS, Call, Layout, call_of, flops_of, moved

STREAM = 4096  # bytes: smaller tensors are scalars, or hold a value per channel, block or row

Access = tuple[numpy.ndarray, int]  # addresses, each once; bytes at each


@contextmanager
def counted() -> Iterator[list[Access]]:
    """Notes what launches in Triton's interpreter read and write: a pass over a tensor counts once a launch."""
    passes: list[Access] = []
    launch: dict[tuple[str, int], list[numpy.ndarray]] = {}
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor

    def noting(verb: str, method: Callable) -> Callable:
        def access(self, ptrs, *rest, **options):
            mask = rest[1 if verb == "write" else 0].data.astype(bool)
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            launch.setdefault((verb, size), []).append(ptrs.data[numpy.broadcast_to(mask, ptrs.data.shape)].ravel())
            return method(self, ptrs, *rest, **options)

        return access

    def call(self, *arguments, **options):
        launch.clear()
        run(self, *arguments, **options)
        passes.extend((numpy.unique(numpy.concatenate(found)), size) for (_, size), found in launch.items())

    run = executor.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", noting("read", builder.create_masked_load))
        patch.setattr(builder, "create_masked_store", noting("write", builder.create_masked_store))
        patch.setattr(executor, "__call__", call)
        yield passes


def bytes_in(tensors: list[Tensor], passes: list[Access]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    ranges = [(start, start + size) for start, size in storages.items()]
    return sum(size * int(((at >= low) & (at < high)).sum()) for at, size in passes for low, high in ranges)


def images(c: int, size: int, dtype=torch.float16) -> Tensor:
    return torch.randn(2, c, size, size).to(dtype, memory_format=torch.channels_last)


def norm() -> Tensor:
    return torch.rand(5, 24) + 0.5


def optimizer_tensors(model_weight: bool) -> dict[str, Tensor | None]:
    """Returns the tensors of an arena with five blocks of matrices and two of vectors."""
    matrix, vector = 5 * BLOCK, 2 * BLOCK
    return {
        "matrix_gradient": torch.randn(matrix).to(torch.float16 if model_weight else torch.float32),
        "vector_gradient": torch.randn(vector),
        "weight": torch.randn(matrix + vector),
        "momentum": torch.randn(matrix + vector),
        "model_weight": torch.randn(matrix).half() if model_weight else None,
        "tensor_of_block": torch.tensor([0, 0, 1, 1, 1, 2, 3], dtype=torch.int32),
        "ratio": torch.ones(4),
        "scalars": torch.tensor([0.1, 1.0, 1.0]),
        "weight_square_sums": torch.zeros(7),
        "running": torch.zeros(24),
        "batch": torch.zeros(24),
        "counters": torch.zeros(3, dtype=torch.int64),
        "loss_scale": torch.ones(1),
    }


def statistics_call() -> tuple:
    return images(24, 26), *(torch.ones(24) for _ in range(4)), 1e-4


def larc_update_call(model_weight: bool, ema: bool = False) -> dict:
    tensors = optimizer_tensors(model_weight)
    if ema:
        tensors |= {"ema_weight": torch.randn(7 * BLOCK), "ema_running": torch.zeros(24)}
        tensors["scalars"] = torch.tensor([0.1, 1.0, 1.0, 0.5])
    factors = {"momentum_factor": 0.9, "weight_decay": 1e-4, "statistics_momentum": 0.1, "growth_interval": 10}
    return tensors | factors


def gradient_statistics_call(decay: float) -> dict:
    held = optimizer_tensors(True)
    names = ("matrix_gradient", "vector_gradient", "weight", "loss_scale")
    return {name: held[name] for name in names} | {"square_sums": torch.zeros(7), "ranks": 1, "weight_decay": decay}


def backward_call(c: int = 24, residual: bool = False) -> tuple:
    dy, x, y = images(c, 26), images(c, 26), images(c, 26)
    return dy, x, y if residual else None, norm(), True, True, residual


def weight(rows: int) -> Tensor:
    """Returns a weight of as many taps, below each other: enough to read x more than once."""
    return torch.randn(24, 24, rows, 1).half().to(memory_format=torch.channels_last)


ONE = ([1, 1], [0, 0], 1)  # stride, padding, groups
THREE = ([1, 1], [1, 0], 1)


def convolution_call(joins: bool) -> tuple:
    """Returns a call with three taps of a raw tensor, or one of a join of two, which it writes; both have sums."""
    center = torch.zeros(24)
    if joins:
        return images(24, 14), weight(1), *ONE, norm(), images(24, 14), norm(), center
    return images(24, 14), weight(3), *THREE, norm(), None, None, center


def data_gradient_call(joined: bool) -> tuple:
    """Returns a call through BatchNorm with sums, whose input is raw, or a join of two with a sparse skip gradient."""
    prologue = images(24, 14), norm(), torch.rand(2, 24)
    epilogue = None, None, images(24, 14), norm(), None, None
    if joined:
        none = (None, None, None)
        epilogue = images(24, 7), images(24, 14), images(24, 14), norm(), images(24, 14), norm(), *none, 2
    return images(24, 14), weight(1), [14, 14], *ONE, *prologue, *epilogue


CALLS: dict[str, tuple[str, Callable[[], tuple | dict]]] = {
    "statistics": ("batch_norm_statistics", statistics_call),
    "batch_norm": ("batch_norm", lambda: (images(24, 26), *torch.ones(2, 24), norm(), None, True, True)),
    "batch_norm_into": ("batch_norm_into", lambda: (images(24, 26), norm(), True, images(40, 26)[:, 8:32])),
    "batch_norm, join": (
        "batch_norm",
        lambda: (images(24, 26), *torch.ones(2, 24), norm(), images(24, 26), True, True),
    ),
    "batch_norm_backward": ("batch_norm_backward", backward_call),
    "batch_norm_backward, join": ("batch_norm_backward", lambda: backward_call(residual=True)),
    "gradient_sums": ("batch_norm_gradient_sums", lambda: (images(24, 26), images(24, 26), None, norm(), True)),
    "gradient_sums, slice": (
        "batch_norm_gradient_sums",
        lambda: (images(40, 26)[:, 8:32], images(24, 26), None, norm(), True),
    ),
    "gradient_sums, join": (
        "batch_norm_gradient_sums",
        lambda: (images(24, 26), images(24, 26), images(24, 26), norm(), True),
    ),
    "gradient_sums, skip and branch": (
        "batch_norm_gradient_sums",
        lambda: (*(images(24, 26) for _ in range(3)), norm(), True, *(images(24, 26) for _ in range(2)), norm()),
    ),
    "gradient_sums, sparse skip": (
        "batch_norm_gradient_sums",
        lambda: (*(images(24, 26) for _ in range(3)), norm(), True, images(24, 13), None, None, 2),
    ),
    "gradient_sums, no relu": (
        "batch_norm_gradient_sums",
        lambda: (images(24, 26), images(24, 26), None, norm(), False),
    ),
    "data_gradient": (
        "batch_norm_data_gradient",
        lambda: (images(24, 26), images(24, 26), norm(), torch.rand(2, 24)),
    ),
    "convolution": ("convolution", lambda: convolution_call(joins=False)),
    "convolution, join": ("convolution", lambda: convolution_call(joins=True)),
    "convolution_data_gradient": ("convolution_data_gradient", lambda: data_gradient_call(joined=False)),
    "convolution_data_gradient, join": ("convolution_data_gradient", lambda: data_gradient_call(joined=True)),
    "convolution_weight_gradient": (
        "convolution_weight_gradient",
        lambda: (
            *(images(24, 14), images(24, 14), weight(3), *THREE),
            *(images(24, 14), norm(), torch.rand(2, 24), norm()),
        ),
    ),
    "convolution_data_gradient, second product": (
        "convolution_data_gradient",
        lambda: (
            *(images(24, 14), weight(1), [14, 14], *ONE, None, None, None, None, None, images(24, 14), norm(), None),
            *(None, images(24, 14), torch.randn(24, 24).half(), torch.rand(2, 24)),
        ),
    ),
    "gram_matrix": ("gram_matrix", lambda: (images(24, 26), [1, 1])),
    "gram_matrix, norm": ("gram_matrix", lambda: (images(24, 26), [1, 1], norm())),
    "max_pool, sparse": ("max_pool", lambda: (images(24, 24), 1, 2, 0, False)),
    "max_pool": ("max_pool", lambda: (images(24, 24), 3, 2, 1, True)),
    "max_pool_into": (
        "max_pool_into",
        lambda: (images(24, 24), 3, 2, 1, True, None, False, images(40, 12)[:, 8:32]),
    ),
    "max_pool_backward": (
        "max_pool_backward",
        lambda: (images(24, 12), torch.zeros(2, 24, 12, 12, dtype=torch.uint8), 24, 24, 3, 2, 1),
    ),
    "max_pool, norm": ("max_pool", lambda: (images(24, 24), 3, 2, 1, True, norm())),
    "max_pool_backward, norm": (
        "max_pool_backward",
        lambda: (
            *(images(24, 12), torch.zeros(2, 24, 12, 12, dtype=torch.uint8), 24, 24, 3, 2, 1),
            *(images(24, 24), norm()),
        ),
    ),
    "global_average": ("global_average", lambda: (images(24, 26),)),
    "global_average_backward": ("global_average_backward", lambda: (torch.randn(2, 24).half(), 13, 13)),
    "cross_entropy": ("cross_entropy", lambda: (torch.randn(9, 130), torch.arange(9), torch.ones(1))),
    "prepare_input": (
        "prepare_input",
        lambda: (
            torch.zeros(2, 31, 33, 3, dtype=torch.uint8),
            torch.tensor([False, True]),
            *torch.ones(2, 3),
            torch.float16,
        ),
    ),
    "prepare_input, a box": (  # each pixel is read of one image
        "prepare_input",
        lambda: (*CALLS["prepare_input"][1](), 3, torch.tensor([1.0, 4, 20, 3, 33])),
    ),
    "gradient_statistics": ("gradient_statistics", lambda: gradient_statistics_call(1e-4)),
    "larc_update": ("larc_update", lambda: larc_update_call(True)),
    "larc_update, fp32": ("larc_update", lambda: larc_update_call(False)),
    "larc_update, with an average": ("larc_update", lambda: larc_update_call(True, ema=True)),
    "refresh": (
        "refresh",
        lambda: {name: optimizer_tensors(True)[name] for name in ("weight", "model_weight", "weight_square_sums")},
    ),
}


@pytest.mark.skipif(not INTERPRETED, reason="loads and stores are counted in the interpreter")
@pytest.mark.parametrize("case", CALLS)
def test_the_bytes_of_an_op_are_those_its_kernels_move(case, monkeypatch):
    monkeypatch.setenv("NVCNN_KERNELS", "triton")
    # The results of several parts stay in the L2 cache, and are more than tensors as small as these. What is moved once
    # a launch counts, so tiles may be large, which the interpreter takes less time for.
    large = {"PARTS": 1, "BLOCK_ROWS": 64, "BLOCK_OUT": 32, "BLOCK_IN": 32}
    tables = {op: config["*"] for op, config in read_table(TEST).items()}
    for op in ("convolution", "convolution_data_gradient", "convolution_weight_gradient", "gram_matrix"):
        for parameter in large.keys() & tables[op].keys():
            monkeypatch.setitem(tables[op], parameter, large[parameter])
    monkeypatch.setitem(tables["gram_matrix"], "BLOCK", 32)
    assert kernels.configurations.table_name(torch.device("cpu")) == TEST
    name, make = CALLS[case]
    made = make()
    args, kwargs = ((), made) if isinstance(made, dict) else (made, {})
    op = getattr(torch.ops.nvcnn, name).default
    with counted() as passes:
        results = op(*args, **kwargs)
    call = call_of(op, *args, outputs=results, **kwargs)
    tensors = [t for t in tree_iter((args, kwargs, results)) if isinstance(t, Tensor)]
    streams = [t for t in tensors if t.nbytes >= STREAM]
    assert streams
    expected = sum(times * tensor.bytes for tensor, times in moved(call) if tensor.bytes >= STREAM)
    again = 24 * 2 if case == "statistics" else 0  # the first pixel, the center of the sums, for the second launch
    assert bytes_in(streams, passes) == expected + again
    everything = sum(size * len(at) for at, size in passes)  # with norm and partial sums, which the cache holds
    assert everything - expected <= 0.15 * expected


def test_what_moves_of_a_tensor():
    assert Layout((2, 3, 4), torch.float16, (12, 4, 1)).bytes == 48
    assert Layout((256, 1000), torch.float32, (0, 1)).bytes == 4000  # expanded: it is there once


def test_flops_are_those_of_the_convolutions():
    """A 3x3 convolution does 18 FLOPs per weight position and output: once forward, once for each gradient."""
    aten = torch.ops.aten
    x, w = (torch.empty(s, device="meta") for s in ((2, 8, 10, 10), (16, 8, 3, 3)))
    dy = torch.empty(2, 16, 10, 10, device="meta")
    geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    forward = call_of(aten.convolution.default, x, w, None, *geometry, outputs=dy)
    assert flops_of(forward) == 2 * (2 * 10 * 10) * 16 * 8 * 9
    assert flops_of(call_of(aten.relu.default, x, outputs=x)) == 0
    ours, geometry = torch.ops.nvcnn, ([1, 1], [1, 1])
    for call in (
        call_of(ours.convolution.default, x, w, *geometry, outputs=(dy, x, x)),
        call_of(ours.convolution_data_gradient.default, dy, w, [10, 10], *geometry, outputs=(x, x, x)),
        call_of(ours.convolution_weight_gradient.default, dy, x, w, *geometry),
    ):
        assert flops_of(call) == flops_of(forward)


def test_a_step_of_resnet50_moves_less_than_the_plain_model():
    ours, plain, fused = (
        {row["name"]: row for row in roofline.rows_of(calls, 256)}
        for calls in (step_calls(), plain_calls(), step_calls(conv="triton"))
    )
    # 4.09 GMAC an image (torchvision's table of its weights), thrice, less the gradient of the first layer's input.
    assert plain["step"]["GFLOP/image"] == pytest.approx(24.3, abs=0.05)
    fourth_channel = 2 * 2 * 112 * 112 * 64 * 7 * 7 / 1e9  # of padded images, forward and in the weight's gradient
    for step in (ours["step"], fused["step"]):
        assert step["GFLOP/image"] == pytest.approx(plain["step"]["GFLOP/image"] + fourth_channel, rel=1e-3)
    assert ours["step"]["MB/image"] < 0.85 * plain["step"]["MB/image"]  # although that has no optimizer
    assert fused["step"]["MB/image"] < 0.6 * plain["step"]["MB/image"]
    assert fused["nvcnn::convolution"]["calls"] == 53
    assert ours["nvcnn::batch_norm"]["calls"] == plain["aten::native_batch_norm"]["calls"] == 53


def test_what_is_concatenated_moves_once():
    """Of GoogLeNet's nine times four branches neither a value nor a gradient is copied."""
    training, evaluation = (calls("googlenet", 2, conv="triton") for calls in (step_calls, evaluation_calls))
    copies = {"aten::cat", "aten::clone", "aten::copy_", "nvcnn::batch_norm"}
    assert not copies & {call.name for call in training + evaluation}
    assert sum(call.name == "nvcnn::batch_norm_into" for call in training) == 9 * 4
    assert sum(call["out"] is not None for call in evaluation) == 9 * 4
    flops = [sum(map(flops_of, filter(is_forward, calls))) for calls in (training, evaluation)]
    assert flops[0] == flops[1] > 0


def is_forward(call: Call) -> bool:
    return call.name == "nvcnn::convolution"


def test_the_floor_is_the_longer_of_bytes_and_flops():
    gpu = GPUS[0]
    x = torch.empty(1, 64, 8, 8, device="meta", dtype=torch.float16)
    (row, step, images_row) = roofline.rows_of([call_of(torch.ops.aten.relu.default, x, outputs=x)] * 3, 1)
    assert row["calls"] == 3
    assert step[gpu.name] == pytest.approx(3 * 2 * 8192 / gpu.bandwidth * 1e6)
    assert images_row[gpu.name] == pytest.approx(1e6 / step[gpu.name])


def test_the_report(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.json"
    arguments = ["--model", "lenet", "--batch", "2", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["roofline", *arguments])
    assert roofline.main() == 0
    assert "images/s at most" in capsys.readouterr().out
    assert '"nvcnn::larc_update"' in file.read_text()
