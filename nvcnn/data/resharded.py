"""Where readers go on when a run goes on with another number of ranks, and the same total batch.

Batch b of the ranks together is the same images then, whatever their number: image i of batch n of rank r is number
(n * ranks + r) * batch_size + i of its epoch. Pillow's workers find it by that number. A reader of DALI cannot be cut
anew in the middle of an epoch, so the readers that began one end it, shared out among the ranks.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from nvcnn.data.batch import Batch
from nvcnn.data.dali import TrainingData
from nvcnn.data.dataset import Dataset
from nvcnn.data.epochs import check_position
from nvcnn.data.options import TrainingOptions

Shares = tuple[int, int]  # ranks, and the batch_size of each


def reshard(states: list[dict[str, Any]], before: Shares, now: Shares, total: int) -> dict[str, Any]:
    """Returns the state of each reader of those `now`, from the states of all readers of those `before`.

    total: the images of a step, of which both have whole ones behind them.
    """
    first = states[0]
    if not first:
        return {}  # synthetic data
    kept = {"backend": first.get("backend", "dali"), "images": first["images"]}
    done = first["batch"] * before[0] * before[1]  # images of the epoch
    if done % (first["images"] // total * total) == 0:
        epoch = first["epoch"] + (done > 0)
        return kept | {"epoch": epoch, "batch": 0, "first": epoch}
    state = kept | {"epoch": first["epoch"], "batch": done // (now[0] * now[1])}
    if state["backend"] != "dali":
        return state
    if "began" in first:  # by the readers of yet other ranks
        readers = {rank: each for state in states for rank, each in state["began"]["readers"].items()}
        return state | {"began": first["began"] | {"readers": readers}}
    return state | {"began": {"ranks": before[0], "batch_size": before[1], "readers": dict(enumerate(states))}}


class ReshardedData:
    """Has the interface and keeps the contract of `dali.TrainingData`: the rest of an epoch that others began, and on.

    Until the epoch ends each batch is made of what those readers hand out. A rank opens the ones of whose batches it
    has a part, and drops the other parts: each batch is as it would have been, crops and mirroring included.
    """

    def __init__(self, dataset: Dataset, options: TrainingOptions, state: dict[str, Any], **how: Any) -> None:
        """state: what `reshard` or `state_dict()` returned. how: the options of TrainingData."""
        self.images, self.options = dataset.count("train"), options
        self.batches_per_epoch = check_position(dataset, options, state, "dali")
        self.epoch: int = state["epoch"]
        self.batch: int = state["batch"]
        began = state["began"]
        self.ranks: int = began["ranks"]
        self.batch_size: int = began["batch_size"]
        mine = sorted({rank for batch in range(options.accumulate) for rank, _, _ in self.parts(batch)})
        accumulate = options.accumulate * options.ranks * options.batch_size // (self.ranks * self.batch_size)
        its = {"ranks": self.ranks, "batch_size": self.batch_size, "accumulate": accumulate}
        its["threads"] = max(1, options.threads // len(mine))
        self.readers = {
            rank: TrainingData(dataset, replace(options, rank=rank, **its), began["readers"][rank], **how)
            for rank in mine
        }
        self.latest: dict[int, Batch] = {}  # of each
        self.own: TrainingData | None = None
        self.begin = lambda: TrainingData(dataset, options, self.next_epoch(), **how)

    def __str__(self) -> str:
        steps = (self.batches_per_epoch - self.batch) // self.options.accumulate
        text = f"the {self.ranks} reader(s) that began epoch {self.epoch + 1} end it (steps left: {steps})"
        times = len(self.readers) * self.options.ranks / self.ranks
        return text + f", each rank decodes {times:g} times as many images as it uses" * (times > 1)

    def __iter__(self) -> "ReshardedData":
        return self

    def __next__(self) -> Batch:
        if self.own is None and self.batch == self.batches_per_epoch:
            self.close()
            self.own = self.begin()
        if self.own is not None:
            return next(self.own)
        parts = []
        for rank, number, part in self.parts(self.batch):
            self.forward(rank, number + 1)
            parts.append(Batch(*(values[part] for values in self.latest[rank])))
        self.batch += 1
        return parts[0] if len(parts) == 1 else Batch(*map(torch.cat, zip(*parts, strict=True)))

    def parts(self, batch: int) -> Iterator[tuple[int, int, slice]]:
        """Yields of what this rank's batch is made: the rank of a reader, the number of its batch, the part of that."""
        options = self.options
        at = (batch * options.ranks + options.rank) * options.batch_size
        end = at + options.batch_size
        while at < end:
            number, first = divmod(at, self.batch_size)
            part = slice(first, min(first + end - at, self.batch_size))
            yield number % self.ranks, number // self.ranks, part
            at += part.stop - part.start

    def forward(self, rank: int, batches: int) -> None:
        """Takes batches from a reader until it has handed out so many of the epoch."""
        while self.readers[rank].batch < batches:
            self.latest[rank] = next(self.readers[rank])

    def next_epoch(self) -> dict[str, Any]:
        epoch = self.epoch + 1
        return {"backend": "dali", "images": self.images, "epoch": epoch, "batch": 0, "first": epoch}

    def state_dict(self) -> dict[str, Any]:
        """Returns the position after the last batch handed out, and those of the readers, which may be further back."""
        if self.own is not None:
            return self.own.state_dict()
        if self.batch == self.batches_per_epoch:
            return self.next_epoch()
        readers = {rank: reader.state_dict() for rank, reader in self.readers.items()}
        began = {"ranks": self.ranks, "batch_size": self.batch_size, "readers": readers}
        return {"backend": "dali", "images": self.images, "epoch": self.epoch, "batch": self.batch, "began": began}

    def close(self) -> None:
        for reader in self.readers.values():
            reader.close()
        if self.own is not None:
            self.own.close()
        self.readers, self.latest = {}, {}
