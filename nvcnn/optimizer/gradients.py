"""Gradients on their way: from autograd into the arena's slices, and from there, bucket by bucket, over the ranks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nvcnn.distributed import Transport
from nvcnn.optimizer.arena import Arena, Slot

BUCKET_BYTES = 25 << 20  # PyTorch DistributedDataParallel's default


class Gradients:
    """Hooks every parameter: the last gradient of a bucket has all copied into their slices, and starts the allreduce.

    A parameter's `gradient_slice` is for kernels that store its gradient there themselves, and return a view of it.

    `batches`: so many make a step. The gradients of each then have slices of their own, which are added to the arena's,
    and only the last batch starts allreduces.
    """

    def __init__(self, arena: Arena, transport: Transport, *, batches: int = 1, bucket_bytes: int = BUCKET_BYTES):
        self.transport, self.batches = transport, batches
        self.batch = 0  # the number, in its step, of the one at hand
        self.slices: list[Tensor] = []  # a bucket each
        self.parts: list[Tensor] = []  # of the batch at hand: the same, or to be added
        self.sizes: list[int] = []  # parameters of a bucket
        for slots, buffer, offset in (
            (arena.slots[: arena.matrices], arena.matrix_gradient, 0),
            (arena.slots[arena.matrices :], arena.vector_gradient, arena.matrix_elements),
        ):
            part = buffer
            if batches > 1:
                part = torch.zeros_like(buffer, dtype=slots[0].parameter.dtype if slots else None)
            for bucket in buckets_of(slots, bucket_bytes // buffer.element_size()):
                start, end = bucket[0].start - offset, bucket[-1].start - offset + bucket[-1].elements
                self.slices.append(buffer[start:end])
                self.parts.append(part[start:end])
                self.sizes.append(len(bucket))
                for slot in bucket:
                    gradient = arena.view(part, slot, offset)
                    hook = self.hook(len(self.slices) - 1, gradient)
                    slot.parameter.register_post_accumulate_grad_hook(hook)
                    same = gradient.dtype == slot.parameter.dtype
                    slot.parameter.gradient_slice = gradient if same else None  # type: ignore[attr-defined]
        self.begin()

    def begin(self) -> None:
        """Call before backward."""
        self.missing = self.sizes.copy()
        self.elsewhere: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.sizes]  # slices, and what belongs there
        self.waits: list[Callable[[], None]] = []

    def hook(self, bucket: int, slice: Tensor) -> Callable[[nn.Parameter], None]:
        storage = slice.untyped_storage()._cdata

        def ready(parameter: nn.Parameter) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if gradient.untyped_storage()._cdata != storage:
                self.elsewhere[bucket].append((slice, gradient))
            self.missing[bucket] -= 1
            if self.missing[bucket] == 0:
                self.reduce(bucket)

        return ready

    def reduce(self, bucket: int) -> None:
        """Copies what is elsewhere into the slices, by one launch, adds them up, and starts the bucket's allreduce."""
        if self.elsewhere[bucket]:
            slices, gradients = zip(*self.elsewhere[bucket], strict=True)
            torch._foreach_copy_(slices, gradients)
            self.elsewhere[bucket] = []
        if self.batches > 1:
            total, part = self.slices[bucket], self.parts[bucket]
            if self.batch == 0:
                total.copy_(part)
            else:
                total.add_(part)
        if self.batch == self.batches - 1:
            self.waits.append(self.transport.all_reduce(self.slices[bucket], f"gradient.{bucket}"))

    def finish(self) -> None:
        """Waits for the buckets that are on their way; call after backward, of each batch.

        Raises RuntimeError where a gradient is missing.
        """
        if any(self.missing):
            raise RuntimeError(f"backward left gradients out: {self.missing} of {self.sizes} per bucket are missing")
        for wait in self.waits:
            wait()
        self.batch = (self.batch + 1) % self.batches
        self.begin()


def buckets_of(slots: list[Slot], elements: int) -> list[list[Slot]]:
    """Returns the slots, in order, in runs of at least `elements` (the last may be shorter)."""
    buckets: list[list[Slot]] = []
    size = elements
    for slot in slots:
        if size >= elements:
            buckets.append([])
            size = 0
        buckets[-1].append(slot)
        size += slot.elements
    return buckets
