"""Compares the ranks: before anything is written what they were given, and every so many steps their weights.

Ranks that were given other flags, data or versions would wait for each other for ever, or train and count images twice,
or of other classes. Weights and momentum are equal to the bit, unless a GPU or its memory is faulty, or a program.
"""

import hashlib
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from nvcnn.data.dataset import Dataset
from nvcnn.distributed import Transport
from nvcnn.machine import chosen_kernels, versions
from nvcnn.optimizer.arena import Arena
from nvcnn.program import InputError
from nvcnn.settings import Evaluation, Settings

# A machine may have them in a place of its own; of --log_dir and --init of training only rank 0's are used.
PLACES = ("data_dir", "log_dir", "checkpoint", "init")
MAY_DIFFER = ("python", "gpu")  # of the versions: neither changes which images are a rank's, or what ranks send
SHOWN = 3  # differences, and ranks that have other weights
# Steps from a sum on the device to its being compared: it is there by then, or else the device has as many to do still,
# and does not run dry while the host waits.
LAG = 10


def check_ranks(
    transport: Transport,
    settings: Settings | Evaluation,
    dataset: Dataset | None,
    split: str,
    validation: Dataset | None = None,
) -> None:
    """Raises InputError, which says what differs, unless all ranks are to do the same. All ranks must call it.

    validation: what training evaluates on.
    """
    if transport.size == 1:
        return
    mine = facts(settings, dataset, split, validation)
    # Of a thousand classes it is long, and there may be thousands of ranks.
    if len(set(transport.gather(hashlib.sha256(repr(mine).encode()).digest()))) == 1:
        return
    first, *others = transport.gather(mine)
    rank, other = next((rank, other) for rank, other in enumerate(others, 1) if other != first)
    different = [name for name in first | other if first.get(name) != other.get(name)]
    shown = [f"{name} is {other.get(name, 'none')}, on rank 0 {first.get(name, 'none')}" for name in different[:SHOWN]]
    more = f"; and {len(different) - SHOWN} more" * (len(different) > SHOWN)
    raise InputError(f"rank {rank} differs: {'; '.join(shown)}{more}: give all ranks the same flags, data and versions")


def facts(
    settings: Settings | Evaluation, dataset: Dataset | None, split: str, validation: Dataset | None = None
) -> dict[str, Any]:
    """Returns what must be the same on all ranks, by the name that a message calls it; the most telling first."""
    found: dict[str, Any] = {"the program": "train.py" if split == "train" else "eval.py"}
    for name, value in asdict(settings).items():
        found[f"--{name}"] = ("given" if value else "not given") if name in PLACES else value
    for data, images in ((dataset, split), (validation, "validation")):
        if data:
            source = data.source(images)
            found[f"the number of {images} images"] = len(source)
            found |= {"num_classes": data.num_classes, "label_base": data.label_base}
            found |= {f"class {n}": repr(name) for n, name in enumerate(data.class_names or ())}
            found[f"the digest of the names of the {images} images"] = source.digest()[:8]
    found["NVCNN_KERNELS"] = chosen_kernels()
    return found | {name: version for name, version in versions().items() if name not in MAY_DIFFER}


class WeightCheck:
    """Compares weights, momentum and averages of the ranks, every so many steps. `every`: 0 for never.

    `reason`: which ranks differ, in words, for good and on all ranks; empty while none does.

    A rank's bits are summed up as integers, so any one that differs changes a sum. The sums start on their way to
    pinned memory, and meet those of the other ranks some steps later: no step waits for the device, but each does with
    `every` 1.
    """

    def __init__(self, arena: Arena, transport: Transport, every: int):
        buffers = (arena.weight, arena.momentum, arena.ema_weight)
        self.bits = [buffer.view(torch.int64) for buffer in buffers if buffer is not None]
        self.transport, self.every = transport, every if transport.size > 1 else 0
        self.lag = min(LAG, every - 1)
        device = arena.weight.device
        self.place = f"{device} of {socket.gethostname()}"
        self.sums = torch.zeros(len(self.bits), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.copied = torch.cuda.Event() if device.type == "cuda" else None
        self.table = torch.zeros(transport.size, len(self.bits), dtype=torch.int64)  # a row for each rank
        self.step = -LAG - 1  # after which there was a sum
        self.wait: Callable[[], None] | None = None  # for the table
        self.reason = ""

    def follow(self, step: int) -> None:
        """Does what is due after a step. All ranks must call it after the same ones."""
        if not self.every:
            return
        self.read()
        if step % self.every == 0:
            self.copy()
            self.step = step
        if step == self.step + self.lag:
            self.send()

    def copy(self) -> None:
        """Starts summing up, and copying the sums."""
        self.sums.copy_(torch.stack([bits.sum() for bits in self.bits]), non_blocking=True)
        if self.copied is not None:
            self.copied.record()

    def send(self) -> None:
        """Starts telling the other ranks what was copied: in the sum over all, each has a row of its own."""
        if self.copied is not None:
            self.copied.synchronize()
        self.table.zero_()[self.transport.rank] = self.sums
        self.wait = self.transport.all_reduce(self.table, "weight_check")

    def read(self) -> None:
        """Judges what was sent last, if anything was: call it once more behind the last step."""
        if self.wait is not None:
            self.wait()
            self.wait = None
            self.judge(self.step, [tuple(row) for row in self.table.tolist()])

    def look(self, step: int) -> None:
        """Judges the latest step, whose number is `step`. This waits for the device, and all ranks must call it."""
        if self.every:
            self.judge(step, self.transport.gather(tuple(int(bits.sum()) for bits in self.bits)))

    def judge(self, step: int, rows: Sequence[tuple[int, ...]]) -> None:
        """Compares what the ranks have summed up."""
        if len(set(rows)) > 1 and not self.reason:
            self.reason = f"at step {step}: {who_differs(rows, self.transport.gather(self.place))}"


def who_differs(rows: Sequence[tuple[int, ...]], places: Sequence[str]) -> str:
    """Returns which ranks have another row than most have, or that there is no such majority."""
    most, count = Counter(rows).most_common(1)[0]
    ranks = len(rows)
    majority = 2 * count > ranks
    odd = [rank for rank, row in enumerate(rows) if row != most or not majority]
    names = [f"{rank} ({places[rank]})" for rank in odd[:SHOWN]] + [f"{len(odd) - SHOWN} more"] * (len(odd) > SHOWN)
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    who = f"rank {listed} differs" if len(odd) == 1 else f"ranks {listed} differ"
    return f"{who}{f' from the other {count}' * majority} in weights or momentum"
