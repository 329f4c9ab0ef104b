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
    """

    def __init__(self, arena: Arena, transport: Transport, *, bucket_bytes: int = BUCKET_BYTES):
        self.transport = transport
        self.slices: list[Tensor] = []  # a bucket each
        self.sizes: list[int] = []  # parameters of a bucket
        for slots, buffer, offset in (
            (arena.slots[: arena.matrices], arena.matrix_gradient, 0),
            (arena.slots[arena.matrices :], arena.vector_gradient, arena.matrix_elements),
        ):
            for bucket in buckets_of(slots, bucket_bytes // buffer.element_size()):
                end = bucket[-1].start - offset + bucket[-1].elements
                self.slices.append(buffer[bucket[0].start - offset : end])
                self.sizes.append(len(bucket))
                for slot in bucket:
                    gradient = arena.gradient(slot)
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
        """Copies what is elsewhere into the slices, by one launch, and starts the bucket's allreduce."""
        if self.elsewhere[bucket]:
            slices, gradients = zip(*self.elsewhere[bucket], strict=True)
            torch._foreach_copy_(slices, gradients)
            self.elsewhere[bucket] = []
        self.waits.append(self.transport.all_reduce(self.slices[bucket], f"gradient.{bucket}"))

    def finish(self) -> None:
        """Waits for the buckets; call after backward. Raises RuntimeError where a gradient is missing."""
        if any(self.missing):
            raise RuntimeError(f"backward left gradients out: {self.missing} of {self.sizes} per bucket are missing")
        for wait in self.waits:
            wait()
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
