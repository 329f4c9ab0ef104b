"""Shards of whatever records a test wants."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nvcnn.data.tfrecord import atomic_writer, write_index, write_record


def write_shard(path: Path, examples: Iterator[bytes]) -> None:
    """A shard and its index; the shard appears last, so one that is there is complete. Skips where CRCs are missing."""
    pytest.importorskip("google_crc32c")
    records, at = [], 0
    with atomic_writer(path) as file:
        for example in examples:
            size = write_record(file, example)
            records.append((at, size))
            at += size
        write_index(path, records)
