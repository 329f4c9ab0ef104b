"""Calls that `benchmarks.trace` recorded, run for real: on random tensors, more of them in turn than a cache holds."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks import timing
from benchmarks.roofline import CONVOLUTIONS, moved
from benchmarks.trace import Call, Layout


def arguments(call: Call, device: torch.device) -> dict[str, Any]:
    """The call's arguments, with tensors of its layouts: activations are normal, other factors in 0.5 .. 1.5."""

    def tensor(name: str, layout: Layout) -> Tensor:
        x = torch.empty_strided(layout.shape, layout.stride, dtype=layout.dtype, device=device)
        if layout.dtype.is_floating_point:
            return x.normal_() if x.dim() == 4 else x.uniform_(0.5, 1.5)
        if layout.dtype == torch.bool:
            return x.random_(0, 2)
        # Labels, below the number of classes; positions in a pooling window; pixels.
        top = call["logits"].shape[1] if name == "targets" else call["kernel_size"] ** 2 if name == "argmax" else 256
        return x.random_(0, top)

    return {
        name: tree_map(lambda v, name=name: tensor(name, v) if isinstance(v, Layout) else v, value,
                       is_leaf=lambda v: isinstance(v, Layout))
        for name, value in call.arguments
    }  # fmt: skip


def replay(call: Call, device: torch.device) -> tuple[timing.Step, int]:
    """A step that runs the call on several sets of tensors in turn, and their number."""
    count = timing.sets(sum(times * layout.bytes for layout, times in moved(call)), device)
    made = [arguments(call, device) for _ in range(count)]

    def step() -> None:
        for one in made:
            call.op(**one)

    return step, count


def describe(call: Call) -> str:
    """The op, its shape, the weight's and the stride, the flags that are set, and what else is fused."""
    values = dict(call.arguments)
    words = [call.name.removeprefix("nvcnn::")]
    shape = next((v.shape for v in values.values() if isinstance(v, Layout)), ())
    words.append(" x ".join(map(str, shape[1:])))
    fused = ["residual", "y"]
    if call.name in CONVOLUTIONS:
        k, _, r, s = call[CONVOLUTIONS[call.name][1]].shape
        words.append(f"weight {k} x {r} x {s} stride {call['stride'][0]}")
        fused += ["residual_vectors", "vectors", "skip", "z", "x_vectors", "branch"]
    words += [name for name, v in values.items() if v is True]
    words += [name for name in fused if isinstance(values.get(name), Layout)]
    return " ".join(words)
