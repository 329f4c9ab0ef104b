"""Trust ratio and norms of every tensor, on their way to metrics.jsonl and TensorBoard while training goes on."""

import torch

from nvcnn.metrics import Metrics
from nvcnn.optimizer.larc import Larc


class TensorLog:
    """Takes the values of one step to the host, where they are written later: no step waits for them.

    On a GPU the copy goes to pinned memory, and an event tells when it is there.
    """

    def __init__(self, larc: Larc):
        on_gpu = larc.ratio.is_cuda
        self.sources = {"trust_ratio": larc.ratio, "gradient_norm": larc.gradient_norm, "weight_norm": larc.weight_norm}
        self.names = [slot.name for slot in larc.arena.slots]
        self.host = torch.empty((len(self.sources), len(self.names)), pin_memory=on_gpu)
        self.copied = torch.cuda.Event() if on_gpu else None
        self.step: int | None = None

    def copy(self, step: int) -> None:
        """Starts copying the values of the latest step, whose number is `step`."""
        self.host.copy_(torch.stack(list(self.sources.values())), non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        self.step = step

    def write(self, metrics: Metrics, *, summarize: bool = False) -> None:
        """Writes what was copied last, once; with `summarize` to TensorBoard as well."""
        if self.step is None:
            return
        if self.copied is not None:
            self.copied.synchronize()
        rows = zip(self.sources, self.host.tolist(), strict=True)
        values = {kind: dict(zip(self.names, row, strict=True)) for kind, row in rows}
        metrics.write("tensors", step=self.step, **values)
        if summarize:
            flat = {f"{kind}/{name}": value for kind, row in values.items() for name, value in row.items()}
            metrics.summarize(self.step, **flat)
        self.step = None
