"""Runs a kernel in Gluon, for which Triton has no interpreter, on CPU tensors: its arithmetic and its barriers.

Programs run one after another. The partitions of a program are threads, and the warps of one act as one. An mbarrier
counts arrivals and bytes, and blocks, as Hopper's does. A product reads its operands when it is issued, or `late`, when
it is waited for: both must give the same, as hardware may do either. Layouts, fences and barriers of warps do nothing.
"""

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

PATIENCE = 20  # seconds that a partition waits for the others


class Memory:
    """Shared memory. What is left in it, or was never stored, is NaN."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.shape, self.dtype = tensor, tensor.shape, tensor.dtype

    def index(self, i):
        return Memory(self.tensor[i])

    def slice(self, start, length):
        return Memory(self.tensor[start : start + length])

    def permute(self, order):
        return Memory(self.tensor.permute(order))

    def load(self, layout):
        return self.tensor.clone()

    def store(self, value):
        assert (value.shape, value.dtype) == (self.shape, self.dtype)
        self.tensor.copy_(value)


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.pending = self.bytes = self.phase = 0

    def init(self, count):
        self.count = self.pending = count

    def change(self, arrivals, more):
        with self.changed:
            self.pending -= arrivals
            self.bytes += more
            assert self.pending >= 0, "more arrivals than the phase takes"
            if self.pending == self.bytes == 0:
                self.phase, self.pending = self.phase ^ 1, self.count
                self.changed.notify_all()

    def wait(self, phase):
        with self.changed:
            assert self.changed.wait_for(lambda: self.phase != phase, PATIENCE), "a partition waits for ever"


class Pointer:
    def __init__(self, values: Tensor, at: Any = 0):
        self.values, self.at = values, at

    def __add__(self, offset):
        return Pointer(self.values, self.at + getattr(offset, "value", offset))


class Tiles:
    """A descriptor, as a kernel has it."""

    layout = None

    def __init__(self, of: TensorDescriptor):
        self.matrix, self.block = of.base.as_strided(of.shape, of.strides), of.block_shape
        self.dtype = of.base.dtype
        self.block_type = SimpleNamespace(nbytes=prod(self.block) * of.base.itemsize)


def load_tile(tiles, corner, ready, memory):
    tile = torch.zeros(tiles.block, dtype=tiles.dtype)  # what is outside is 0
    inside = tiles.matrix[corner[0] :][: tiles.block[0]]
    tile[: len(inside)] = inside
    memory.store(tile)
    ready.change(0, -tiles.block_type.nbytes)


def store(pointer, value, mask=None):
    at, mask = torch.broadcast_to(pointer.at, value.shape), torch.ones(()) if mask is None else mask
    mask = torch.broadcast_to(mask, value.shape).bool()
    assert value.dtype == pointer.values.dtype
    pointer.values[at[mask]] = value[mask]


def allocate(dtype, shape, layout):
    if dtype != torch.int64:
        return Memory(torch.full(shape, torch.nan, dtype=dtype))
    if len(shape) == 1:
        return Barrier()
    barriers = [Barrier() for _ in range(shape[0])]
    return SimpleNamespace(index=barriers.__getitem__)


def warp_specialize(partitions, warps, registers):
    with ThreadPoolExecutor(len(partitions)) as pool:
        for ended in [pool.submit(function, *arguments) for function, arguments in partitions]:
            ended.result()


def multiply(late, a, b, result, is_async):
    def product():
        return (result.double() + a.tensor.double() @ b.tensor.double()).float()

    if late:
        return product
    value = product()
    return lambda: value


class Emulated:
    """Stands for a kernel of a module: emulated[grid](...)."""

    def __init__(self, module: Any, name: str, late: bool):
        self.fn = getattr(module, name).fn
        language = SimpleNamespace(
            arange=lambda start, end, layout: torch.arange(start, end),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            load=lambda pointer: pointer.values[pointer.at],
            cdiv=lambda a, b: -(-a // b),
            program_id=lambda axis: self.program,
            num_programs=lambda axis: self.programs,
            store=store,
            where=torch.where,
            sum=torch.sum,
            float32=torch.float32,
            int64=torch.int64,
            static_range=range,
            allocate_shared_memory=allocate,
            warp_specialize=warp_specialize,
            **dict.fromkeys(("constexpr", "SliceLayout", "BlockedLayout", "NVMMADistributedLayout"), MagicMock()),
        )
        mbarrier = SimpleNamespace(
            init=Barrier.init,
            expect=lambda barrier, count: barrier.change(1, count),
            arrive=lambda barrier: barrier.change(1, 0),
            wait=Barrier.wait,
            MBarrierLayout=MagicMock(),
        )
        self.names = vars(module) | {"gl": language, "mbarrier": mbarrier, "load_tile": load_tile}
        self.names |= {"warpgroup_mma": partial(multiply, late), "warpgroup_mma_wait": lambda left, waited: waited[0]()}
        self.names |= dict.fromkeys(("fence_async_shared", "barrier"), MagicMock())
        for name, value in vars(module).items():
            if isinstance(value, GluonJITFunction):
                self.names[name] = FunctionType(value.fn.__code__, self.names)

    def __getitem__(self, grid):
        return partial(self.run, grid)

    def run(self, grid, *args, **constants):
        names = inspect.signature(self.fn).parameters
        bound = inspect.signature(self.fn).bind(*args, **{n: v for n, v in constants.items() if n in names})
        values = [self.of(value) for value in bound.arguments.values()]
        for program in range(grid[0]):
            self.program, self.programs = torch.tensor([program, grid[0]], dtype=torch.int32)
            FunctionType(self.fn.__code__, self.names)(*values)

    @staticmethod
    def of(value: Any) -> Any:
        """Returns an argument as a kernel sees it. A tensor is the values in its memory."""
        if isinstance(value, TensorDescriptor):
            return Tiles(value)
        return Pointer(value.as_strided((value.numel(),), (1,))) if isinstance(value, Tensor) else value
