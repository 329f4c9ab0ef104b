"""Gradients on their way: from autograd into the arena's slices, and from there, bucket by bucket, over the ranks."""

from collections.abc import Callable

from torch import Tensor, nn

from nvcnn.arena import Arena, Slot
from nvcnn.distributed import Transport

BUCKET_BYTES = 25 << 20  # PyTorch DistributedDataParallel's default


class Gradients:
    """Hooks every parameter: its gradient is copied into its slice, and the last one of a bucket starts the allreduce.

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
                    hook = self.hook(len(self.slices) - 1, arena.gradient(slot))
                    slot.parameter.register_post_accumulate_grad_hook(hook)
        self.begin()

    def begin(self) -> None:
        """Before the first backward of a step."""
        self.missing = [size * self.accumulate for size in self.sizes]
        self.waits: list[Callable[[], None]] = []

    def hook(self, bucket: int, slice: Tensor) -> Callable[[nn.Parameter], None]:
        size = self.sizes

        def ready(parameter: nn.Parameter) -> None:
            gradient = parameter.grad
            if gradient is not None and gradient.data_ptr() != slice.data_ptr():  # else a kernel stored it there
                first_pass = self.missing[bucket] > size[bucket] * (self.accumulate - 1)
                slice.copy_(gradient) if first_pass else slice.add_(gradient)
                parameter.grad = None
            self.missing[bucket] -= 1
            if self.missing[bucket] == 0:
                self.waits.append(self.transport.all_reduce(self.slices[bucket], f"gradient.{bucket}"))

        return ready

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
