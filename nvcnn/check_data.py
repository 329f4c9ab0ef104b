"""Checks every sample before a run starts, shared out over ranks and their cores."""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from functools import partial

from nvcnn.data.dataset import Dataset
from nvcnn.data.pillow import require_pillow
from nvcnn.data.processes import forked, worker_pool
from nvcnn.data.scan import bad_samples
from nvcnn.distributed import Transport
from nvcnn.program import InputError, doing, here

PIECE = 256  # samples a process takes at a time
SAID = 20  # bad samples that are printed at most; metrics.jsonl has all
PATIENCE = 10.0  # seconds between lines of progress


def check_data(
    dataset: Dataset, split: str, what: str, skip_bad_images: bool, transport: Transport, processes: int
) -> tuple[Dataset, list[str]]:
    """Returns the data set without its bad samples, and a line about each. All ranks get the same.

    what: "none"; "records", to read each sample and check its label and, in TFRecords, its CRC; or "images", to decode
    it with Pillow, too. skip_bad_images: decodes, whatever `what` is, and leaves bad samples out.
    Raises InputError for the first bad sample unless `skip_bad_images`.
    """
    if what == "none" and not skip_bad_images:
        return dataset, []
    require_pillow()
    images = dataset.count(split)
    mine = range(images)[transport.rank :: transport.size]
    start = time.monotonic()
    with doing("checks its data"):
        found = search(dataset, split, mine, what == "images" or skip_bad_images, processes, quiet=transport.rank != 0)
    bad = dict(sorted(pair for part in transport.gather(found) for pair in part))
    lines = list(bad.values())
    if transport.rank == 0:
        print(f"Checked {images} {split} images in {time.monotonic() - start:.1f} s: {len(bad)} bad", flush=True)
    if bad and not skip_bad_images:
        raise InputError(f"{lines[0]} ({len(bad)} bad of {images}: --skip_bad_images leaves them out)")
    if len(bad) == images:
        raise InputError(f"--data_dir={dataset.directory}: all {images} {split} images are bad, the first: {lines[0]}")
    if bad and transport.rank == 0:
        rest = [f"  ... and {len(bad) - SAID} more"] if len(bad) > SAID else []
        print(*(f"  left out: {line}" for line in lines[:SAID]), *rest, sep="\n", file=sys.stderr, flush=True)
    return (dataset.without(split, bad) if bad else dataset), lines


def search(
    dataset: Dataset, split: str, samples: Sequence[int], images: bool, processes: int, quiet: bool
) -> list[tuple[int, str]]:
    """Returns (number, what is wrong) of each bad sample. Raises InputError when a process is killed."""
    pieces = [samples[at : at + PIECE] for at in range(0, len(samples), PIECE)]
    look = partial(bad_samples, dataset, split, images=images)
    if processes == 1 or len(pieces) < 2:
        return look(samples)
    found, said = [], time.monotonic()
    with worker_pool(processes, look) as pool:
        pending = [pool.submit(forked, piece) for piece in pieces]
        for done, result in enumerate(as_completed(pending), 1):
            found += result.result()
            here.moves += 1
            if not quiet and time.monotonic() - said > PATIENCE:
                said = time.monotonic()
                print(f"Checking {split} images: {100 * done / len(pieces):.0f} %", flush=True)
    return found
