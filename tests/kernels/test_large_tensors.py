"""Tensors of more than 2^31 values: the last program of every launch reaches the last value, and nothing beyond.

Only that program runs, in the interpreter, on tensors of the meta device; loads give zeros, and addresses are noted.
"""

import inspect
from importlib import import_module

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import kernels  # noqa: F401 (registers the ops)
from kernels import configurations, conv_shape
from kernels.implementation import INTERPRETED
from kernels.operators import operators

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="addresses are noted in Triton's interpreter")
APART = 44  # bits: tensors are so far apart that an address tells which one is meant


def end_of(tensor: torch.Tensor) -> int:
    """Returns how many bytes it reaches from its first value on; a slice, over the values between."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in strides)) * tensor.itemsize


class Launches:
    """Stands in for the interpreter's executor. `reached`: the tensors of all launches, with the last byte touched."""

    def __init__(self):
        self.tensors, self.reached = [], {}

    def place(self, tensor):
        """Returns a pointer to the tensor, the same one wherever it is an argument."""
        if not any(tensor is known for known in self.tensors):
            self.tensors.append(tensor)
        index = next(i for i, known in enumerate(self.tensors, 1) if tensor is known)
        handle = interpreter._implicit_cvt(tensor)
        handle.handle.data = np.array([index << APART], dtype=np.uint64)
        return handle

    def note(self, pointers, mask):
        """Fails for an address outside its tensor."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        for address in (addresses[mask.data].min(initial=2**64 - 1), addresses[mask.data].max(initial=0)):
            if address in (0, 2**64 - 1):
                continue  # no lane is active
            index, offset = int(address) >> APART, int(address) & ((1 << APART) - 1)
            assert 1 <= index <= len(self.tensors), f"address {offset - (1 << APART)}: overflow"
            tensor = self.tensors[index - 1]
            assert offset + size <= end_of(tensor), (tuple(tensor.shape), offset)
            self.reached[index] = max(self.reached.get(index, 0), offset + size)

    def run(self, executor, *arguments, **options):
        given = {name: value for name, value in options.items() if name in executor.arg_names}
        scope = interpreter._patch_lang(executor.fn)
        try:
            named = inspect.getcallargs(executor.fn, *arguments, **given)
            for name, value in named.items():
                if name not in executor.constexprs and value is not None:
                    is_tensor = isinstance(value, torch.Tensor)
                    named[name] = self.place(value) if is_tensor else interpreter._implicit_cvt(value)
            grid = (*executor.grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            interpreter.interpreter_builder.set_grid_idx(*(n - 1 for n in grid))
            executor.fn(**named)
        finally:
            scope.restore()


@pytest.fixture
def launches(monkeypatch):
    found = Launches()

    def load(builder, pointers, mask, other, *_, **__):
        found.note(pointers, mask)
        kind = pointers.get_element_ty()
        return interpreter.TensorHandle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind)), kind)

    def store(builder, pointers, value, mask, *_, **__):
        found.note(pointers, mask)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", store)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *a, **k: found.run(*a, **k))
    monkeypatch.setattr(configurations, "table_name", lambda device: "")
    monkeypatch.setattr(configurations, "say_once", lambda line: None)
    monkeypatch.setattr(conv_shape, "capability", lambda device: 8)  # without TMA every address is computed
    of_weight = import_module("kernels.convolution_weight_gradient")
    monkeypatch.setattr(of_weight, "parts_of", lambda *_: 2**15)  # so that the last has few rows
    monkeypatch.setattr(import_module("kernels.gram_matrix"), "SMS", 2**10)
    pool = import_module("kernels.max_pool")
    configured = pool.configured

    def a_program_for_each_tile(*given):
        return {name: 2**30 if name == "PROGRAMS" else value for name, value in configured(*given).items()}

    monkeypatch.setattr(pool, "configured", a_program_for_each_tile)
    monkeypatch.setenv("NVCNN_KERNELS", "triton")
    return found


def meta(*shape, dtype=torch.float16):
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def norm(*shape):
    return meta(*shape, dtype=torch.float32)


X = (11000, 64, 56, 56)  # 2.2e9 values
C = X[1]
SLICE = meta(11000, 72, 56, 56)[:, 8:]  # of channels
PLAIN, PADDED = ((1, 1), (0, 0), 1), ((1, 1), (1, 1), 1)  # strides, padding, groups
CALLS = {
    "global_average": lambda: [meta(*X)],
    "global_average_backward": lambda: [meta(2**16, 2**12), 3, 3],
    "batch_norm_statistics": lambda: [meta(*X), *(norm(C) for _ in range(4)), 1e-4],
    "batch_norm": lambda: [meta(*X), norm(C), norm(C), norm(5, C), meta(*X), True, True],
    "batch_norm_backward": lambda: [SLICE, meta(*X), meta(*X), norm(5, C), True, True, True],
    "batch_norm_into": lambda: [meta(*X), norm(5, C), True, SLICE],
    "max_pool": lambda: [meta(*X), 3, 1, 1, True],
    "max_pool norm": lambda: [meta(*X), 3, 1, 1, True, norm(5, C)],
    "max_pool_into": lambda: [meta(*X), 3, 1, 1, True, norm(5, C), False, SLICE],
    "max_pool_backward": lambda: [meta(*X), meta(*X, dtype=torch.uint8), 56, 56, 3, 1, 1],
    "max_pool_backward norm": lambda: [
        *(meta(*X), meta(*X, dtype=torch.uint8), 56, 56, 3, 1, 1),
        *(meta(*X), norm(5, C)),
    ],
    "cross_entropy": lambda: [meta(2**17, 20000), meta(2**17, dtype=torch.int64), norm(1), 0.1],
    "convolution": lambda: [meta(*X), meta(C, C, 3, 3), *PADDED, norm(5, C), None, None, norm(C)],
    "convolution join": lambda: [meta(*X), meta(C, C, 1, 1), *PLAIN, norm(5, C), meta(*X), norm(5, C)],
    "convolution_data_gradient": lambda: [
        *(meta(*X), meta(C, C, 3, 3), (56, 56), *PADDED, meta(*X), norm(5, C), norm(2, C)),
        *(None, None, meta(*X), norm(5, C)),
    ],
    "convolution_data_gradient join": lambda: [
        *(meta(*X), meta(C, C, 1, 1), (56, 56), *PLAIN, None, None, None),
        *(meta(*X), meta(*X), meta(*X), norm(5, C), meta(*X), norm(5, C)),
    ],
    "convolution_weight_gradient": lambda: [
        *(meta(*X), meta(*X), meta(C, C, 3, 3), *PADDED),
        *(meta(*X), norm(5, C), norm(2, C), norm(5, C)),
    ],
    "convolution_data_gradient second": lambda: [
        *(meta(*X), meta(C, C, 1, 1), (56, 56), *PLAIN, None, None, None, None, None, meta(*X), norm(5, C), None, None),
        *(meta(*X), meta(C, C), norm(2, C)),
    ],
    "gram_matrix": lambda: [meta(*X), (1, 1), norm(5, C)],
    "gram_matrix strided": lambda: [meta(4 * X[0], C, 56, 56), (2, 2)],
    "prepare_input": lambda: [
        meta(15000, 224, 224, 3, dtype=torch.uint8).contiguous(),
        meta(15000, dtype=torch.bool),
        *(norm(3), norm(3), torch.float16, 3),
    ],
}


def test_offsets_that_would_overflow_are_refused(monkeypatch):
    x = meta(1, 2**10, 2**11, 2**10)  # 2^31 values
    monkeypatch.setenv("NVCNN_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"reach over 2\^31 values of images \(1024, 2048, 1024\)"):
        operators["nvcnn::convolution"].launcher(x, meta(8, 2**10, 1, 1), *PLAIN)


@pytest.mark.parametrize("call", CALLS)
def test_offsets_do_not_overflow(launches, call):
    operators[f"nvcnn::{call.split()[0]}"].launcher(*CALLS[call]())
    large = [i for i, tensor in enumerate(launches.tensors, 1) if tensor.numel() > 2**31]
    assert large
    for i in large:
        tensor = launches.tensors[i - 1]
        end = end_of(tensor)
        assert launches.reached[i] > end - 2**20, (tuple(tensor.shape), launches.reached[i], end)
