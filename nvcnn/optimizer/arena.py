"""The parameter arena: all weights, momentum, gradients and BatchNorm statistics of a model in a few flat buffers.

docs/architecture.md has the table of buffers and how a gradient gets into its slice.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

import kernels
from nvcnn.models.layers import BatchNorm2d
from nvcnn.program import InputError


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies: elements `start` to `start + parameter.numel()` of the (M + V) buffers."""

    name: str
    parameter: nn.Parameter
    start: int

    @property
    def elements(self) -> int:
        """Returns its size, padded to whole blocks."""
        return -(-self.parameter.numel() // kernels.BLOCK) * kernels.BLOCK


class Arena:
    """Moves a model's trainable parameters into flat buffers on `device`; each parameter becomes a view.

    `frozen` has, by name, the fp32 values of the parameters that are not trained, and of running statistics likewise.

    `dtype` is the compute dtype: parameters of two or more dimensions get model weights of it, the others stay fp32.
    `gradient_dtype` (default: `dtype`) is that of the first kind's gradients; `momentum_dtype` is fp32 or bf16.
    `ema`: whether there is an exponential moving average of weights and running statistics, which begins with them.
    `order` is that in which backward finishes the gradients: `nvcnn.meta.gradient_order`.
    """

    def __init__(
        self,
        model: nn.Module,
        order: Iterable[str],
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        gradient_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype = torch.float32,
        ema: bool = False,
    ):
        self.model = model.to(device)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.fixed = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.frozen = {name: p.detach() for name, p in self.fixed.items()}
        for p in self.fixed.values():
            if p.ndim >= 2:
                p.data = p.data.to(dtype, memory_format=torch.channels_last if p.ndim == 4 else torch.preserve_format)
        order = [name for name in order if name in named]
        if missing := named.keys() - set(order):
            raise ValueError(f"parameters that get no gradient: {', '.join(sorted(missing))}")

        matrices = [name for name in order if named[name].ndim >= 2]
        vectors = [name for name in order if named[name].ndim < 2]
        self.slots: list[Slot] = []
        end = 0
        for name in chain(matrices, vectors):
            self.slots.append(Slot(name, named[name], end))
            end += self.slots[-1].elements
        self.matrices = len(matrices)  # the first of the slots
        self.matrix_elements = sum(slot.elements for slot in self.slots[: self.matrices])

        def zeros(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(n, dtype=dtype, device=device)

        m, v = self.matrix_elements, end - self.matrix_elements
        self.weight, self.momentum = zeros(end), zeros(end, momentum_dtype)
        self.model_weight = None if dtype == torch.float32 else zeros(m, dtype)
        self.matrix_gradient, self.vector_gradient = zeros(m, gradient_dtype or dtype), zeros(v)
        self.weight_square_sums = zeros(end // kernels.BLOCK)
        blocks = torch.tensor([slot.elements // kernels.BLOCK for slot in self.slots])
        first = torch.cat([torch.zeros(1, dtype=torch.int64), blocks.cumsum(0)])
        self.first_block = first.to(device, torch.int32)
        self.tensor_of_block = torch.repeat_interleave(torch.arange(len(self.slots)), blocks).to(device, torch.int32)

        for slot in self.slots:
            master = self.view(self.weight, slot)
            master.copy_(slot.parameter.data)
            if self.model_weight is None or slot.start >= m:
                slot.parameter.data = master
            else:
                slot.parameter.data = self.view(self.model_weight, slot)
            slot.parameter.grad = None

        batch_norms = [(name, module) for name, module in model.named_modules() if isinstance(module, BatchNorm2d)]
        self.batch_norms = [bn for _, bn in batch_norms if not bn.frozen]
        for name, bn in batch_norms:
            if bn.frozen:
                self.frozen |= {f"{name}.running_mean": bn.running_mean, f"{name}.running_var": bn.running_var}
        momenta = {bn.momentum or 0.0 for bn in self.batch_norms} or {0.0}
        if len(momenta) > 1:
            raise ValueError(f"BatchNorm layers of different momentum: {sorted(momenta)}; one launch commits them all")
        self.statistics_momentum = momenta.pop()
        statistics = 2 * sum(bn.num_features for bn in self.batch_norms)
        self.running, self.batch = zeros(statistics), zeros(statistics)
        self.statistics: dict[str, slice] = {}  # where in `running` they lie, by name
        offset = 0
        for name, bn in batch_norms:
            for kind in () if bn.frozen else ("mean", "var"):
                at = slice(offset, offset + bn.num_features)
                offset += bn.num_features
                self.statistics[f"{name}.running_{kind}"] = at
                self.running[at] = getattr(bn, f"running_{kind}")
                setattr(bn, f"running_{kind}", self.running[at])
                setattr(bn, f"batch_{kind}", self.batch[at])
        self.ema_weight: Tensor | None = self.weight.clone() if ema else None
        self.ema_running: Tensor | None = self.running.clone() if ema else None
        self.refresh()

    @staticmethod
    def view(buffer: Tensor, slot: Slot, offset: int = 0) -> Tensor:
        """Returns the slot's part of a flat buffer in the parameter's shape, channels-last if of four dimensions."""
        shape = slot.parameter.shape
        flat = buffer[slot.start - offset : slot.start - offset + shape.numel()]
        if len(shape) != 4:
            return flat.view(shape)
        k, c, r, s = shape
        return flat.view(k, r, s, c).permute(0, 3, 1, 2)

    def gradient(self, slot: Slot) -> Tensor:
        """Returns the slot's gradient, summed over ranks once its bucket is reduced; loss scale and ranks are in it."""
        if slot.start < self.matrix_elements:
            return self.view(self.matrix_gradient, slot)
        return self.view(self.vector_gradient, slot, self.matrix_elements)

    def refresh(self) -> None:
        """Rebuilds what is derived from the master weights. Call after every write except the optimizer's."""
        for name, p in self.fixed.items():
            p.data.copy_(self.frozen[name])
        kernels.refresh(self.weight, self.model_weight, self.weight_square_sums)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the averages are in the place of the model's weights and of this rank's running statistics.

        Behind it all has its bits of before. Without averages nothing changes. No step may be made inside. The weights
        are in memory once more.
        """
        if self.ema_weight is None or self.ema_running is None:
            yield
            return
        kept = self.weight.clone(), self.running.clone()
        try:
            self.put(self.ema_weight, self.ema_running)
            yield
        finally:
            self.put(*kept)

    def put(self, weight: Tensor, running: Tensor) -> None:
        """Copies these into the place of weights and running statistics."""
        self.weight.copy_(weight)
        self.running.copy_(running)
        self.refresh()

    def named(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """Returns the model's state_dict, with fp32 master weights or their averages, as they lie in the buffers."""
        weight, running = (self.ema_weight, self.ema_running) if averaged else (self.weight, self.running)
        assert weight is not None
        assert running is not None
        state = self.model.state_dict() | self.frozen | {slot.name: self.view(weight, slot) for slot in self.slots}
        return state | {name: running[at] for name, at in self.statistics.items()}

    def state_dict(self, *, averaged: bool = False) -> dict[str, Tensor]:
        """Returns what `named` does, on the CPU, each tensor contiguous and alone."""
        return {name: on_host(value) for name, value in self.named(averaged=averaged).items()}

    @torch.no_grad()
    def load_state_dict(self, weights: dict[str, Tensor], *, averaged: bool = False) -> None:
        """Copies weights and statistics, or their averages, in by name; averages begin with weights that come in.

        Raises InputError unless names and shapes fit.
        """
        own = self.named(averaged=averaged)
        if problem := misfit(own, weights):
            raise InputError(f"these weights are not this model's: {problem}")
        for name, value in own.items():
            value.copy_(weights[name])
        self.refresh()
        if self.ema_weight is not None and self.ema_running is not None and not averaged:
            self.ema_weight.copy_(self.weight)
            self.ema_running.copy_(self.running)

    def momentum_dict(self) -> dict[str, Tensor]:
        """Returns the momentum of each parameter by its name, on the CPU."""
        return {slot.name: on_host(self.view(self.momentum, slot)) for slot in self.slots}

    def load_momentum_dict(self, momentum: dict[str, Tensor]) -> None:
        """Copies momentum in by name."""
        for slot in self.slots:
            self.view(self.momentum, slot).copy_(momentum[slot.name])


def on_host(value: Tensor) -> Tensor:
    """Returns a contiguous copy on the CPU, by one pass over it."""
    return value.to("cpu", copy=True, memory_format=torch.contiguous_format)


def misfit(own: dict[str, Tensor], given: dict[str, Tensor]) -> str | None:
    """Returns in words the first way in which a state_dict does not fit a model's own, or None."""
    for kind, names in (("lacks", own.keys() - given.keys()), ("has the unknown", given.keys() - own.keys())):
        if names:
            return f"the file {kind} {min(names)}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    for name, value in own.items():
        if value.shape != given[name].shape:
            return f"{name} is {tuple(given[name].shape)} in the file, {tuple(value.shape)} in the model"
    return None
