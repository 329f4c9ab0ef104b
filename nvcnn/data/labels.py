"""Looks at some labels before a run: whether there is something to learn, and whether classes come mixed."""

from collections import Counter
from collections.abc import Iterable

from nvcnn.data.shard_source import SHUFFLE_BUFFER
from nvcnn.data.source import Source
from nvcnn.program import InputError

LOOKED_AT = 64  # samples, spread over all, and as many in a row
MOSTLY = 0.9  # where one class has so many images, a row of them says nothing about their order


def doubts(source: Source, backend: str) -> list[str]:
    """Returns a line for each thing that is most likely wrong with the labels of shards. backend: what reads them."""
    if not source.firsts():  # class folders
        return []
    images = len(source)
    looked_at = min(images, LOOKED_AT)
    spread = labels_of(source, (images * n // looked_at for n in range(looked_at)))
    if len(spread) == 1:
        found = f"all {spread.total()} images looked at, of {images}, have the label {min(spread)}"
        return [f"{found}: if all have it, there is nothing to learn"]
    mixed = backend == "torch" or images <= SHUFFLE_BUFFER or max(spread.values(), default=0) > MOSTLY * looked_at
    if not mixed and len(row := labels_of(source, range(LOOKED_AT))) == 1:
        return [
            f"the first {row.total()} images all have the label {min(row)}: shuffle when shards are made, as "
            f"prepare.py does, since DALI mixes but {SHUFFLE_BUFFER} images at a time; --data_backend=torch mixes all"
        ]
    return []


def labels_of(source: Source, samples: Iterable[int]) -> Counter[int | str]:
    """Returns how many have each label. Those that cannot be read, which training will say, do not count."""
    found: Counter[int | str] = Counter()
    for i in samples:
        try:
            found[source.read(i)[1]] += 1
        except InputError:
            continue
    return found
