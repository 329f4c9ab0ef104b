"""What each rank goes on with when a run goes on with another number of ranks. The total batch is the same.

Weights, momentum and counters are equal on all ranks; what is each rank's own becomes that of the new ones here. It
follows from the checkpoint and the number of ranks alone, so that a run that is resumed twice has the same bits.
"""

from typing import Any

import torch

from nvcnn.data.epochs import derived_seed
from nvcnn.data.resharded import reshard
from nvcnn.settings import Settings

PARTS = ("batch_size", "accumulate")  # settings of which, with the ranks, the total batch is the product
AVERAGED = ("running", "ema_running", "average")


def total_batch(settings: dict[str, Any], ranks: int) -> int:
    return ranks * settings["batch_size"] * settings.get("accumulate", 1)  # an older checkpoint has no --accumulate


def other_total(stored: dict[str, Any], there: int, settings: dict[str, Any], here: int) -> str:
    """Returns what to give so that the total batch is the checkpoint's, in words; "" if it is."""
    total, now = total_batch(stored, there), total_batch(settings, here)
    if total == now:
        return ""
    said = f"a total batch of {total} (on {there} ranks), here it is {now} (on {here})"
    if total % here:
        return f"{said}: start a number of ranks that divides {total}"
    size, mine = stored["batch_size"], total // here
    parts = [f"--batch_size={size} --accumulate={mine // size}"] * (mine % size == 0 and mine > size)
    parts.append(f"--batch_size={mine}" + " --accumulate=1" * (settings["accumulate"] > 1))
    return f"{said}: give {' or '.join(parts)}"


def resharded(state: dict[str, Any], settings: Settings, size: int) -> list[dict[str, Any]]:
    """Returns the entries `ranks` of a checkpoint, as they are, or for so many ranks as there are now.

    Running statistics, their averages and those of the loss are the mean over the ranks before; timm averages the
    statistics likewise (`--dist-bn reduce`). Random generators begin anew, each rank's with a seed of its own.
    """
    ranks = state["ranks"]
    if len(ranks) == size:
        return ranks
    stored, step = state["settings"], int(state["optimizer"]["counters"][0])
    before, now = (len(ranks), stored["batch_size"]), (size, settings.batch_size)
    reader = reshard([rank["reader"] for rank in ranks], before, now, total_batch(stored, len(ranks)))
    same: dict[str, Any] = {"reader": reader}
    for name in AVERAGED:
        if all(name in rank for rank in ranks):  # an older checkpoint has rank 0's alone
            same[name] = torch.stack([rank[name] for rank in ranks]).mean(0)
    return [same | {"seed": derived_seed(settings.seed, "generators", step, size, rank)} for rank in range(size)]
