"""Runs calls that `benchmarks.trace` recorded for real, on random tensors.

Several sets of them take turns, so that together they exceed a cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks import timing
from kernels.operators import operators
from nvcnn.roofline import CONVOLUTIONS, Call, Layout, moved

Arguments = dict[str, Any]
WEIGHT_GRADIENT = "nvcnn::convolution_weight_gradient"


def arguments(call: Call, device: torch.device) -> Arguments:
    """Returns the call's arguments, with random tensors of its layouts.

    Activations are normal, and other factors lie in 0.5 .. 1.5. A weight's gradient is a sum over all pixels. What
    would make it grow with their number, and not with the square root of that, is divided by the root, and all of the
    gradient by 16, so that fp16 holds it.
    """

    def tensor(name: str, layout: Layout) -> Tensor:
        x = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=device)
        if layout.dtype.is_floating_point:
            return x.normal_() if x.dim() == 4 else x.uniform_(0.5, 1.5)
        if layout.dtype == torch.bool:
            return x.random_(0, 2)
        # Labels lie below the number of classes, positions below the size of a pooling window, and pixels below 256.
        top = call["logits"].shape[1] if name == "targets" else call["kernel_size"] ** 2 if name == "argmax" else 256
        return x.random_(0, top)

    made = {
        name: tree_map(lambda v, name=name: tensor(name, v) if isinstance(v, Layout) else v, value,
                       is_leaf=lambda v: isinstance(v, Layout))
        for name, value in call.arguments
    }  # fmt: skip
    if call.name == WEIGHT_GRADIENT:
        made["g"].div_(16)
        if made.get("factors") is not None:
            root = (made["g"].numel() / made["g"].shape[1]) ** 0.5
            made["norm"][0].div_(root)  # the mean of y
            made["factors"].div_(16)[1].div_(root)
    return made


def outcome(call: Call, made: Arguments) -> list[Tensor]:
    """Returns the tensors that the call returns or writes into its arguments.

    An op of the project is called as a step calls it: for a second call of the same form it repeats its launches.
    """
    if call.name in operators:
        first, *others = made
        returned = operators[call.name](made[first], **{name: made[name] for name in others})
    else:
        returned = call.op(**made)
    written = [
        made.get(a.name) for a in call.op._schema.arguments if a.alias_info is not None and a.alias_info.is_write
    ]
    return [t for t in tree_leaves((returned, written)) if isinstance(t, Tensor) and t.numel()]


def whole(results: list[Tensor]) -> list[Tensor]:
    """Returns the results in float64, except for whole numbers, with sums added over their parts.

    Sums are (2, parts, channels), and each kernel chooses how many parts there are.
    """
    return [t.double().sum(1) if t.dim() == 3 else t.double() if t.is_floating_point() else t for t in results]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Returns the norm of the difference over the norm of `theirs`, which is NaN if there is a NaN.

    For whole numbers it returns the share that differs.
    """
    if not theirs.is_floating_point():
        return (ours != theirs).double().mean().item()
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-300)).item()


def argument_sets(call: Call, device: torch.device) -> list[Arguments]:
    """Returns so many sets of arguments that they exceed the cache."""
    count = timing.sets(sum(times * layout.bytes for layout, times in moved(call)), device)
    return [arguments(call, device) for _ in range(count)]


def replay(function: Callable[..., object], made: list[Arguments]) -> timing.Step:
    """Returns a step that calls the function with each set in turn."""

    def step() -> None:
        for one in made:
            function(**one)

    return step


def library(call: Call) -> Callable[..., object] | None:
    """Returns PyTorch's convolution alone (on a GPU cuDNN's), or None if the call is no convolution.

    It takes the call's arguments and leaves out what is fused into the call.
    """

    def geometry(made: Arguments) -> tuple[Any, ...]:
        return made["stride"], made["padding"], [1, 1], False, [0, 0], made.get("groups", 1)

    def forward(**made: Any) -> object:
        return torch.ops.aten.convolution(made["x"], made["weight"], None, *geometry(made))

    def data_gradient(**made: Any) -> object:
        g, weight = made["g"], made["weight"]
        size = g.shape[0], weight.shape[1] * made.get("groups", 1), *made["size"]
        x = torch.empty(size, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)  # its shape counts
        return torch.ops.aten.convolution_backward(g, x, weight, None, *geometry(made), [True, False, False])

    def weight_gradient(**made: Any) -> object:
        g, x, weight = made["g"], made["x"], torch.empty_like(made["out"], dtype=made["g"].dtype)  # its shape counts
        return torch.ops.aten.convolution_backward(g, x, weight, None, *geometry(made), [False, True, False])

    ops = {"convolution": forward, "convolution_data_gradient": data_gradient}
    return (ops | {"convolution_weight_gradient": weight_gradient}).get(call.name.removeprefix("nvcnn::"))


def describe(call: Call) -> str:
    """Returns the op, its shape, the weight's shape and stride, the flags that are set, and what else is fused."""
    values = dict(call.arguments)
    words = [call.name.removeprefix("nvcnn::")]
    shape = next((v.shape for v in values.values() if isinstance(v, Layout)), ())
    words.append(" x ".join(map(str, shape[1:])))
    fused = ["residual", "y", "mix", "share"]
    if "max_pool" in call.name:
        fused.append("norm")
    if call.name in CONVOLUTIONS:
        k, _, r, s = call[CONVOLUTIONS[call.name][1]].shape
        words.append(f"weight {k} x {r} x {s} stride {call['stride'][0]}")
        fused += ["residual_norm", "norm", "skip", "z", "x_norm", "branch"]
    words += [name for name, v in values.items() if v is True]
    words += [name for name in fused if isinstance(values.get(name), Layout)]
    return " ".join(words)
