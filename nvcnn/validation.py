"""Evaluation in the middle of training: on all ranks, and training goes on to the same bits as without it."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from nvcnn.data.batch import Batch
from nvcnn.data.dataset import Dataset
from nvcnn.distributed import Transport, Vote
from nvcnn.evaluate import count_hits, open_validation, summed
from nvcnn.models import Preprocessing
from nvcnn.program import Signals
from nvcnn.step import Step


class Validation:
    """The validation images of a run. `best`: the highest top-1 so far, in percent; minus infinity before the first.

    `left_out`: names of bad images, which are not in `dataset` any more.

    All ranks make one, and evaluate together. Each evaluation opens its reader, and closes it: it would hold memory,
    and worker processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        left_out: list[str],
        best: float,
        backend: str,
        step: Step,
        threads: int,
    ):
        self.step, self.normalize, self.left_out, self.best = step, preprocessing.normalize, left_out, best
        self.transport = transport = step.transport
        self.images = dataset.count("validation")
        # The folder, or the first shard: where there is no val/ it may be test/.
        first = Path(dataset.source("validation").name(0).partition(": ")[0])
        self.place = first.relative_to(dataset.directory).parts[0]
        batch_size = min(batch_size, self.images)
        self.batches = math.ceil(math.ceil(self.images / transport.size) / batch_size)  # of the rank that has the most
        device = step.arena.weight.device
        self.data = open_validation(dataset, backend, preprocessing, batch_size, transport, device, threads)

    def evaluate(self, signals: Signals) -> list[dict[str, Any]]:
        """Returns the result of each kind of weights: with --ema the trained ones', then the averages'.

        None of them if a signal came to any rank before the end. Takes nothing from training's generators and readers.
        """
        results = []
        for averaged in (None,) if self.step.arena.ema_weight is None else (False, True):
            start = time.monotonic()
            weights = self.step.arena.averaged() if averaged else nullcontext()
            with weights, self.step.evaluation() as model:
                batches = UntilStopped(self.data, self.batches, self.transport, signals)
                counts = count_hits(model, batches, self.step.dtype, self.normalize)
            if batches.stopped:
                return []
            result = summed(counts, self.transport) | {"seconds": round(time.monotonic() - start, 2)}
            if averaged is not None:
                result["ema"] = averaged
            if self.left_out:
                result["left_out"] = len(self.left_out)
            results.append(result)
        return results


class UntilStopped:
    """Iterates over a rank's batches, until a signal comes to any rank: then all ranks are `stopped` at the same one.

    most: batches of the rank that has the most.
    """

    def __init__(self, data: Iterable[Batch], most: int, transport: Transport, signals: Signals):
        self.data, self.most, self.transport, self.signals = data, most, transport, signals
        self.stopped = False

    def __iter__(self) -> Iterator[Batch]:
        vote, batches = Vote(self.transport, 1, "evaluation.vote"), iter(self.data)
        for _ in range(self.most):
            with self.signals.waiting():
                batch = next(batches, None)
            if batch is not None:
                yield batch
            (self.stopped,) = vote(bool(self.signals))
            if self.stopped:
                break
        vote.wait()
