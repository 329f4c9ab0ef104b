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
    `accumulate`: backward passes (micro-batches) per step; their gradients are added up.
    """

    def __init__(self, arena: Arena, transport: Transport, *, bucket_bytes: int = BUCKET_BYTES, accumulate: int = 1):
        self.transport, self.accumulate = transport, accumulate
        self.slices: list[Tensor] = []  # a bucket each
        self.sizes: list[int] = []  # parameters of a bucket
        matrices = [slot for slot in arena.slots if slot.start < arena.matrix_elements]
        vectors = arena.slots[len(matrices) :]
        for slots, buffer, offset in (
            (matrices, arena.matrix_gradient, 0),
            (vectors, arena.vector_gradient, arena.matrix_elements),
        ):
            for bucket in buckets_of(slots, bucket_bytes // buffer.element_size()):
                end = bucket[-1].start - offset + bucket[-1].elements
                self.slices.append(buffer[bucket[0].start - offset : end])
                self.sizes.append(len(bucket))
                for slot in bucket:
                    gradient = arena.gradient(slot)
                    hook = self.hook(len(self.slices) - 1, gradient)
                    slot.parameter.register_post_accumulate_grad_hook(hook)
                    stored = accumulate == 1 and gradient.dtype == slot.parameter.dtype
                    slot.parameter.gradient_slice = gradient if stored else None  # type: ignore[attr-defined]
        self.begin()

    def begin(self) -> None:
        """Before the first backward of a step."""
        self.missing = [size * self.accumulate for size in self.sizes]
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
            if self.missing[bucket] % self.sizes[bucket] == 0:
                self.full(bucket)

        return ready

    def full(self, bucket: int) -> None:
        """After each pass: what is elsewhere goes into the slices by one launch, and with the last over the ranks."""
        if self.elsewhere[bucket]:
            slices, gradients = zip(*self.elsewhere[bucket], strict=True)
            first_pass = self.missing[bucket] == self.sizes[bucket] * (self.accumulate - 1)
            (torch._foreach_copy_ if first_pass else torch._foreach_add_)(slices, gradients)
            self.elsewhere[bucket] = []
        if self.missing[bucket] == 0:
            self.waits.append(self.transport.all_reduce(self.slices[bucket], f"gradient.{bucket}"))

    def finish(self) -> None:
        """After the last backward: waits for the buckets, then is ready for the next step."""
        if any(self.missing):
            raise RuntimeError(f"backward left gradients out: {self.missing} of {self.sizes} per bucket are missing")
        for wait in self.waits:
            wait()
        self.begin()


def buckets_of(slots: list[Slot], elements: int) -> list[list[Slot]]:
    """Cuts slots, in order, into runs of at least `elements` (but for the last)."""
    buckets: list[list[Slot]] = []
    size = elements
    for slot in slots:
        if size >= elements:
            buckets.append([])
            size = 0
        buckets[-1].append(slot)
        size += slot.elements
    return buckets
