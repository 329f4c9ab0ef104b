"""Compares the ranks before anything is written: they must have been given the same flags, data and versions.

Ranks that differ would wait for each other for ever, or train and count images twice, or of other classes.
"""

import hashlib
from dataclasses import asdict
from typing import Any

from nvcnn.data.dataset import Dataset
from nvcnn.distributed import Transport
from nvcnn.machine import chosen_kernels, versions
from nvcnn.program import InputError
from nvcnn.settings import Evaluation, Settings

# A machine may have them in a place of its own; of --log_dir and --init of training only rank 0's are used.
PLACES = ("data_dir", "log_dir", "checkpoint", "init")
MAY_DIFFER = ("python", "gpu")  # of the versions: neither changes which images are a rank's, or what ranks send
SHOWN = 3  # differences


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
