"""The step as one CUDA graph: whether that is possible, its capture, which leaves all state as it was, its replay.

A graph is the launches that were recorded, with their addresses: nothing of Python runs at a replay. What it reads and
writes must stay where it is, nothing may be read back to the host, and kernels must be loaded and cuDNN's algorithms
chosen before: the warm-up does both, and is undone by a `Snapshot`.
"""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from nvcnn.machine import random_state, set_random_state
from nvcnn.program import InputError

WARM_UP = 3  # as PyTorch's documentation has it
AHEAD = 2  # steps that the host may be ahead of the device: enough to keep it busy


def why_not(asked: str, *, gpu: bool, kernels: str, ranks: int, transport: str) -> str:
    """Returns in words why the step is launched kernel by kernel; "" if it is a graph.

    asked: --cuda_graph. kernels: "triton" or "reference". Raises InputError for "on" where it cannot be.
    """
    obstacles = (
        (not gpu, "there is no GPU", "leave the flag out"),
        (kernels == "reference", "NVCNN_KERNELS=reference reads values back to the host", "leave one of them out"),
        (ranks > 1 and transport != "torch", "Horovod's allreduces cannot be captured", "give --transport=torch"),
    )
    if asked == "off":
        return "--cuda_graph=off"
    for there, reason, remedy in obstacles:
        if there and asked == "on":
            raise InputError(f"--cuda_graph=on: {reason}: {remedy}")
        if there:
            return reason
    return ""


class Snapshot:
    """The bits of tensors, and of the random generators of host and device."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device):
        self.device = device
        self.kept = [(tensor, tensor.clone()) for tensor in tensors]
        self.generators = random_state(device)

    @torch.no_grad()
    def restore(self) -> None:
        """Writes the bits back, in place."""
        for tensor, kept in self.kept:
            tensor.copy_(kept)
        set_random_state(self.generators, self.device)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Keeps garbage collection from freeing what belongs to CUDA in the middle of a capture, which would end that."""
    gc.collect()  # now, with all that keeps an old step's autograd graph alive
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def quick_captures() -> Iterator[None]:
    """Has garbage collections inside look at new objects alone: each capture has one, of 0.1 s if it looks at all."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def record(functions: Sequence[Callable[[], object]], warm_up: int) -> list[Callable[[], None]]:
    """Runs each function some times, which loads kernels and lets cuDNN choose; returns their replays as CUDA graphs.

    Warm-up and capture call from one thread, on one stream: cuDNN's choices are kept by thread, and backward's leaves
    must be on the stream it runs on; where they are not, PyTorch warns, which is an error here. Other threads (DALI's,
    NCCL's) go on meanwhile. What is made inside is in memory of the graphs, which they take in turn: no function may
    read what another has made there. The first should need most, as others fit in. Triton's kernels stay loaded: their
    functions hold them. What a function holds stays where it is as long as its replay is there.
    """
    stream, pool, before = torch.cuda.Stream(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    graphs = [torch.cuda.CUDAGraph() for _ in functions]
    stream.wait_stream(before)
    # Around the capture as well: one that fails would leave its stream the current one.
    with torch.cuda.stream(stream), warnings.catch_warnings(), without_garbage_collection():
        warnings.filterwarnings("error", message=".*AccumulateGrad node's stream")
        for function in functions:  # all before any capture, since they are in other memory
            for _ in range(warm_up):
                function()
        for graph, function in zip(graphs, functions, strict=True):
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                function()
    before.wait_stream(stream)

    def replay(graph: torch.cuda.CUDAGraph, inputs: object) -> None:  # it holds addresses, not the tensors there
        graph.replay()

    return [partial(replay, graph, function) for graph, function in zip(graphs, functions, strict=True)]


def capture(functions: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
    """Returns functions that replay these, as `record` has it, together at most AHEAD calls ahead of the device."""
    try:
        launches = record(functions, WARM_UP)
    except Exception as error:
        error.add_note("This was a CUDA graph in the making: --cuda_graph=off goes without.")
        raise
    turns = cycle([torch.cuda.Event(blocking=True) for _ in range(AHEAD)])

    def replay(launch: Callable[[], None]) -> None:
        done = next(turns)
        done.synchronize()
        launch()
        done.record()

    return [partial(replay, launch) for launch in launches]
