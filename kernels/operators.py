"""Launchers as PyTorch operators, nvcnn::NAME, which torch.compile, torch.export, opcheck and profilers know.

As `torch.library.custom_op` makes them, without its bookkeeping: that takes longer than a launch, and a training step
makes hundreds of calls. Where nothing traces, the launcher is called without PyTorch's dispatcher, too.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import Parameter

operators: dict[str, "Operator"] = {}  # by qualified name: what `benchmarks` and tests launch on tensors without memory


def traced(x: Tensor) -> bool:
    """Returns whether somebody wants to see calls with `x`: a compiler, a mode, a transform, a profiler, a subclass."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, Parameter)
        or x.is_meta
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd._profiler_enabled()
    )


def wants_gradient(arguments: Iterable[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)


class Operator:
    """Calls the launcher, through PyTorch's dispatcher where calls are traced. The first argument is a tensor."""

    def __init__(self, name: str, launcher: Callable[..., Any], mutates_args: Sequence[str]):
        update_wrapper(self, launcher)
        self.launcher, self.name = launcher, f"nvcnn::{name}"
        torch.library.define(self.name, torch.library.infer_schema(launcher, mutates_args=mutates_args))
        torch.library.impl(self.name, "CompositeExplicitAutograd", launcher)
        self.overload = getattr(torch.ops.nvcnn, name).default
        self.function: Any = None  # with gradients
        operators[self.name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if traced(args[0]):
            return self.overload(*args, **kwargs)
        if not wants_gradient((*args, *kwargs.values())):
            return self.launcher(*args, **kwargs)
        if self.function is None or kwargs:
            return self.overload(*args, **kwargs)
        return self.function.apply(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """`fake` is called in the launcher's place while a compiler traces: it returns outputs without values."""
        torch.library.register_fake(self.name, fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """The gradients: `setup_context(ctx, inputs, output)` keeps what `backward(ctx, *gradients)` needs."""

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
