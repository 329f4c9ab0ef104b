"""Shards of whatever records a test wants."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nvcnn.data.records import Records
from nvcnn.data.shard_source import atomic_writer, index_path
from nvcnn.data.tfrecord import write_record


def write_shard(path: Path, examples: Iterator[bytes]) -> None:
    """A shard and its index; the shard appears last, so one that is there is complete. Skips where CRCs are missing."""
    pytest.importorskip("google_crc32c")
    lines, at = [], 0
    with atomic_writer(path) as file:
        for example in examples:
            size = write_record(file, example)
            lines.append(f"{at} {size}")
            at += size
        with atomic_writer(index_path(path)) as index:
            index.write(Records.index_text(lines).encode())
