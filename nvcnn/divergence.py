"""Whether a run has diverged: no step is applied any more, or its loss is not finite although gradients are.

Every few steps the host copies some values of the device, and reads what it copied the time before: no step waits.
"""

import math

import torch

from nvcnn.optimizer.larc import Larc

EVERY = 10  # steps between two copies


class Divergence:
    """What the copies have told. `reason`: why the run must stop, in words, for good; empty while it need not.

    `good`: whether the step that was read last was applied, with a finite loss.
    """

    def __init__(self, larc: Larc, max_skipped: int):
        self.larc, self.max_skipped = larc, max_skipped
        self.every = min(EVERY, max_skipped)
        on_gpu = larc.counters.is_cuda
        self.counters = torch.empty(3, dtype=torch.int64, pin_memory=on_gpu)
        self.values = torch.empty(7, pin_memory=on_gpu)
        self.copied = torch.cuda.Event() if on_gpu else None
        self.pending = False
        self.applied, self.updates, _ = larc.counters.tolist()  # of the last step that may have been applied
        self.reason, self.good = "", True

    def copy(self) -> None:
        """Starts copying what the latest step has left."""
        larc = self.larc
        self.counters.copy_(larc.counters, non_blocking=True)
        self.values.copy_(torch.cat([larc.latest, larc.scalars[:3], larc.loss_scale]), non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        self.pending = True

    def follow(self) -> None:
        """Judges what was copied last, and starts the next copy; if that is on its way still, does neither."""
        if self.pending and self.copied is not None and not self.copied.query():
            return
        self.read()
        self.copy()

    def read(self) -> None:
        """Judges what was copied last, once it is there."""
        if not self.pending:
            return
        self.pending = False
        if self.copied is not None:
            self.copied.synchronize()
        step, updates, _ = self.counters.tolist()
        loss, _, _, rate, _, applied, scale = self.values.tolist()
        self.good = bool(applied) and math.isfinite(loss)
        if updates != self.updates:
            self.applied, self.updates = step, updates
        where = f"at step {step}, learning rate {rate:g}, loss scale {scale:g}"
        skipped = step - self.applied
        if self.reason:
            return
        if skipped >= self.max_skipped:
            self.reason = f"{where}: {skipped} steps in a row were skipped, since gradients were not finite"
        elif applied and not math.isfinite(loss):
            self.reason = f"{where}: the loss is {loss}, although gradients are finite"

    def look(self) -> None:
        """Judges the latest step, and its weights. This waits for the device."""
        self.read()
        self.copy()
        self.read()
        if not self.reason and not self.larc.arena.weight_square_sums.isfinite().all():
            self.reason = f"after {self.counters[0]} steps: weights are not finite, or beyond 1e19"
