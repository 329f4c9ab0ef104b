"""Launches, and their repetition: what a launcher allocates and starts follows from shapes, not from values.

A launcher checks its arguments, looks its configuration up and binds each kernel's arguments, which takes Python longer
than many kernels run. So it runs once for arguments of given shapes; what it allocated and started is kept, and later
calls do that alone.
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia.compiler import CUDAOptions
from triton.experimental.gluon.nvidia import hopper
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.implementation import INTERPRETED

PLAIN = frozenset((Tensor, Parameter))
DESCRIPTORS = TensorDescriptor, hopper.TensorDescriptor
OPTIONS = CUDAOptions.__dataclass_fields__.keys()  # which the compiler takes beside arguments


class State(threading.local):
    silent = False  # whether launches start nothing
    recording: "Recording | None" = None


state = State()


@contextmanager
def silent() -> Iterator[None]:
    """Launches start nothing inside: what a launcher returns then has shapes and no values, as compilers ask for."""
    before, state.silent = state.silent, True
    try:
        yield
    finally:
        state.silent = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Starts a kernel, as kernel[grid](*args, **constants) does. Launchers start kernels by this alone."""
    if state.silent:
        return
    if INTERPRETED and (unknown := constants.keys() - inspect.signature(kernel.fn).parameters - OPTIONS):
        raise KeyError(f"{kernel.fn.__module__}: no kernel's argument: {', '.join(sorted(unknown))}")  # as compiled
    recording, state.recording = state.recording, None  # Triton's interpreter computes with PyTorch's operators
    compiled = kernel[grid](*args, **constants)
    state.recording = recording
    if recording is not None:
        signature = inspect.signature(kernel.fn)
        bound = signature.bind(*args, **{name: x for name, x in constants.items() if name in signature.parameters})
        bound.apply_defaults()
        start = (compiled or kernel)[(*grid, 1, 1)[:3]]  # the interpreter compiles nothing
        recording.launched(start, list(bound.arguments.values()))


def form(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Returns what a launcher's work follows from: of tensors all but the values and the address, others themselves."""
    return tuple(
        [(x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16) if type(x) in PLAIN else x for x in arguments]
    )


class Repetition:
    """What a launcher did, to be done again for other tensors of the same form.

    All that launches take is found in one list: the arguments; what is `made`, new tensors, or views and descriptors of
    an element of the list; the `constants`.
    """

    def __init__(self) -> None:
        self.made: list[tuple[int | None, Callable[..., Any]]] = []
        self.constants: list[Any] = []
        self.launches: list[tuple[Callable[..., Any], Callable[[list[Any]], tuple[Any, ...]]]] = []
        self.output: Callable[[list[Any]], Any]

    def __call__(self, arguments: Sequence[Any]) -> Any:
        values = list(arguments)
        for source, make in self.made:
            values.append(make() if source is None else make(values[source]))
        values += self.constants
        for start, chosen in self.launches:
            start(*chosen(values))
        return self.output(values)


class Recording(TorchDispatchMode):
    """Runs a launcher and notes what it does, unless that is more than allocations, views and launches."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: list[Any] = []
        self.numbers: list[tuple[int, Any]] = []  # places of what a launch may take
        self.made: list[tuple[int | None, Callable[..., Any]]] = []
        self.launches: list[tuple[Callable[..., Any], list[Any]]] = []
        self.complete = True

    def run(self, launcher: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Repetition | None]:
        """Returns what the launcher returns, and how to repeat it; None where it computes with PyTorch's operators."""
        # A tensor that is given twice need not be the next time: each argument is an object of its own.
        self.arguments = [x.detach() if type(x) in PLAIN else x for x in (*args, *kwargs.values())]
        self.numbers = list(enumerate(self.arguments))
        named = dict(zip(kwargs, self.arguments[len(args) :], strict=True))
        before, state.recording = state.recording, self
        try:
            with self:
                output = launcher(*self.arguments[: len(args)], **named)
        finally:
            state.recording = before
        repetition = self.repetition(output)
        return output, repetition if self.complete else None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if state.recording is None:
            return result
        if func is torch.ops.aten.detach.default:  # what Python's functions return of what they allocate
            self.numbers.append((self.number(args[0]), result))
        elif "empty" in func._schema.name:
            how = {"dtype": result.dtype, "device": result.device}
            self.make(result, None, partial(torch.empty_strided, result.shape, result.stride(), **how))
        elif func.is_view:
            place = {"size": result.shape, "stride": result.stride()}
            offset = result.storage_offset() - args[0].storage_offset()
            self.make(result, self.number(args[0]), partial(view_of, **place, offset=offset))
        else:
            self.complete = False
        return result

    def make(self, result: Any, source: int | None, how: Callable[..., Any]) -> None:
        self.numbers.append((len(self.arguments) + len(self.made), result))
        self.made.append((source, how))

    def number(self, value: Any) -> int:
        """Returns the place of a tensor or descriptor among the arguments and what was made of them."""
        for number, known in self.numbers:
            if known is value:
                return number
        self.complete = False
        return 0

    def launched(self, start: Callable[..., Any], values: list[Any]) -> None:
        for value in values:
            if isinstance(value, DESCRIPTORS):
                self.make(value, self.number(value.base), partial(descriptor_of, like=descriptor_of(None, value)))
        self.launches.append((start, values))

    def repetition(self, output: Any) -> Repetition:
        found = Repetition()
        found.made = self.made
        count = len(self.arguments) + len(self.made)

        def place(value: Any) -> int:
            if isinstance(value, (Tensor, *DESCRIPTORS)):
                return self.number(value)
            found.constants.append(value)
            return count + len(found.constants) - 1

        found.launches = [(start, itemgetter(*map(place, values))) for start, values in self.launches]
        if isinstance(output, tuple):
            found.output = itemgetter(*map(place, output))
        else:
            found.output = itemgetter(place(output))
        return found


def view_of(tensor: Tensor, size: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    """Returns a view that begins `offset` values behind the tensor, wherever that lies in its storage."""
    return tensor.as_strided(size, stride, tensor.storage_offset() + offset)


def descriptor_of(tensor: Tensor | None, like: TensorDescriptor) -> TensorDescriptor:
    """Returns `like` for another tensor of the same form, without Triton's checks of it."""
    made = copy(like)
    made.base = tensor
    return made
