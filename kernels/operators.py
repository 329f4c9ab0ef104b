"""Launchers as PyTorch operators, nvcnn::NAME, which torch.compile, torch.export, opcheck and profilers know.

As `torch.library.custom_op` makes them, without its bookkeeping: that takes longer than a launch, and a training step
makes hundreds of calls. Where nothing traces, the launcher is called without PyTorch's dispatcher, too.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from triton import JITFunction

from kernels.implementation import runs_triton
from kernels.launch import PLAIN, Recording, Repetition, form, silent

operators: dict[str, "Operator"] = {}  # by qualified name: what `benchmarks` and tests launch on tensors without memory
UNKNOWN: Any = object()  # stands for a repetition that is not recorded yet


def traced(x: Tensor) -> bool:
    """Returns whether somebody wants to see calls with `x`: a compiler, a mode, a transform, a profiler, a subclass."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in PLAIN
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    )


def wants_gradient(arguments: Iterable[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


class Operator:
    """Calls the launcher, through PyTorch's dispatcher where calls are traced, or the first argument has a name."""

    def __init__(self, name: str, launcher: Callable[..., Any], mutates_args: Sequence[str]):
        update_wrapper(self, launcher)
        self.launcher, self.name = launcher, f"nvcnn::{name}"
        torch.library.define(self.name, torch.library.infer_schema(launcher, mutates_args=mutates_args))
        torch.library.impl(self.name, "CompositeExplicitAutograd", launcher)
        torch.library.register_fake(self.name, silent()(launcher))
        self.overload = getattr(torch.ops.nvcnn, name).default
        self.function: Any = None  # with gradients
        self.repetitions: dict[Any, Repetition | None] = {}  # by the arguments' form
        operators[self.name] = self
        hash_callees_first(launcher.__globals__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not args or traced(args[0]):
            return self.overload(*args, **kwargs)
        arguments = (*args, *kwargs.values())
        if wants_gradient(arguments):
            if self.function is None or kwargs:
                return self.overload(*args, **kwargs)
            return self.function.apply(*args)
        if not runs_triton(args[0].device):
            return self.launcher(*args, **kwargs)
        key = (tuple(kwargs), *form(arguments))
        try:
            repetition = self.repetitions.get(key, UNKNOWN)
        except TypeError:  # a list has no hash
            repetition = None
        if repetition is UNKNOWN:
            output, self.repetitions[key] = Recording().run(self.launcher, *args, **kwargs)
            return output
        return self.launcher(*args, **kwargs) if repetition is None else repetition(arguments)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """Registers gradients: `setup_context(ctx, inputs, output)` keeps what `backward(ctx, *gradients)` needs."""

        def forward(ctx, *inputs):
            output = self(*inputs)
            setup_context(ctx, inputs, output)
            return output

        def differentiable(*inputs):
            if wants_gradient(inputs):
                return self.function.apply(*inputs)
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*inputs)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.function = type(self.__name__, (Function,), methods)  # type: ignore[attr-defined]
        torch.library.impl(self.name, "Autograd", differentiable)


@contextmanager
def looked_up_again() -> Iterator[None]:
    """Launchers look their configurations up anew, inside and behind it: for callers that change them meanwhile."""
    kept = {each: each.repetitions for each in operators.values()}
    try:
        for each in kept:
            each.repetitions = {}
        yield
    finally:
        for each, repetitions in kept.items():
            each.repetitions = repetitions


def hash_callees_first(namespace: Mapping[str, Any]) -> None:
    """Has Triton hash the module's functions, each behind those it calls, which are defined or imported above it.

    To the hash that names a kernel in Triton's cache belong the constants of the functions that it calls, but only of
    those that have a hash already (3.6 and 3.7): else a kernel's name, and whether it is compiled again, would depend
    on what else the process has launched before.
    """
    for value in namespace.values():
        if isinstance(value, JITFunction) and value.hash is None:
            module = sys.modules[value.module]
            if vars(module) is not namespace:
                hash_callees_first(vars(module))
            value.cache_key  # noqa: B018 (a property that keeps what it computes)


def named(name: str, *arguments: str) -> Callable[[Any], str]:
    """Returns what `triton.jit(repr=...)` takes, so that a profile tells kernels apart: `name` and these arguments.

    Of a constant its value is appended, of a tensor its name, if it is there.
    """

    def name_of(specialization: Any) -> str:
        words = [specialization.constants.get(argument, argument) for argument in arguments]
        return "_".join([name, *(str(word) for word in words if word is not None)])

    return name_of


def operator(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an annotated launcher the operator nvcnn::NAME. `mutates_args`: the arguments it writes."""
    return lambda launcher: Operator(name, launcher, mutates_args)
