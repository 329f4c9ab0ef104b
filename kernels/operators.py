"""Launchers as PyTorch operators, nvcnn::NAME, which torch.compile, torch.export and opcheck know.

As `torch.library.custom_op` makes them, without its bookkeeping: that takes longer than a launch, and a training step
makes hundreds of calls. (In microseconds for 7 arguments, on a 2-core AMD EPYC with torch 2.13: 12 against 4 without a
gradient, 58 against 16 with one.)
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from triton import JITFunction

operators: dict[str, "Operator"] = {}  # by qualified name: what `benchmarks` and tests launch on tensors without memory


class Operator:
    """Calls the operator, not the launcher itself, which is `launcher`."""

    def __init__(self, name: str, launcher: Callable[..., Any], mutates_args: Sequence[str]):
        update_wrapper(self, launcher)
        self.launcher, self.name = launcher, f"nvcnn::{name}"
        torch.library.define(self.name, torch.library.infer_schema(launcher, mutates_args=mutates_args))
        torch.library.impl(self.name, "CompositeExplicitAutograd", launcher)
        self.overload = getattr(torch.ops.nvcnn, name).default
        operators[self.name] = self
        hash_callees_first(launcher.__globals__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """`fake` is called in the launcher's place while a compiler traces: it returns outputs without values."""
        torch.library.register_fake(self.name, fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """The gradients: `setup_context(ctx, inputs, output)` keeps what `backward(ctx, *gradients)` needs."""
        overload = self.overload

        def forward(ctx, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                output = overload(*inputs)
            setup_context(ctx, inputs, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function: Any = type(self.__name__, (Function,), methods)  # type: ignore[attr-defined]

        def differentiable(*inputs):
            if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
                return function.apply(*inputs)
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*inputs)

        torch.library.impl(self.name, "Autograd", differentiable)


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


def operator(name: str, *, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Makes an annotated launcher the operator nvcnn::NAME. `mutates_args`: the arguments it writes."""
    return lambda launcher: Operator(name, launcher, mutates_args)
