"""WebDataset's tars, `train-*.tar` and `validation-*.tar` or `val-*.tar`, as a source.

A sample is KEY.jpg (or jpeg, png) and KEY.cls, a decimal number, side by side. Each tar has an index in the format of
DALI's wds2idx, with only these two members in it:

    v1.2 SAMPLES
    jpg OFFSET SIZE NAME cls OFFSET SIZE NAME
"""

import re
import sys
import tarfile
import tempfile
from collections.abc import Collection, Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvcnn.data.source import Files, same_everywhere
from nvcnn.data.tfrecord import atomic_writer, index_path
from nvcnn.program import InputError

IMAGES = ("jpg", "jpeg", "png")
PREFIXES = {"train": ("train",), "validation": ("validation", "val")}
LINE = re.compile(rf"(?:{'|'.join(IMAGES)}) (\d+) (\d+) (\S+) cls (\d+) (\d+) \S+")


class Tars:
    def __init__(self, shards: list[Path], left_out: Collection[int] = ()):
        self.shards = shards
        self.left_out = sorted(left_out)
        self.files = Files()

    @cached_property
    def table(self) -> Tensor:
        """(samples, 6) int64: shard, line of its index, offset and size of image and label."""
        rows = []
        for n, shard in enumerate(self.shards):
            for line, text in enumerate(read_index(shard)):
                offset, size, _, label, label_size = LINE.fullmatch(text).groups()  # type: ignore[union-attr]
                rows.append((n, line, int(offset), int(size), int(label), int(label_size)))
        table = torch.tensor(rows, dtype=torch.int64).view(-1, 6)
        kept = torch.ones(len(table), dtype=torch.bool)
        kept[self.left_out] = False
        return table[kept]

    def __len__(self) -> int:
        return len(self.table)

    def firsts(self) -> list[int]:
        """The first sample of each tar that has any."""
        shards = self.table[:, 0].tolist()
        return [i for i, shard in enumerate(shards) if i == 0 or shard != shards[i - 1]]

    def name(self, i: int) -> str:
        shard, line, offset = self.table[i, :3].tolist()
        name = LINE.fullmatch(read_index(self.shards[shard])[line])[3]  # type: ignore[index]
        return self.place(f"{self.shards[shard]}:{offset}:{name}")

    def place(self, info: str) -> str:
        return re.sub(r":(\d+):([^:]*)$", r": \2 at byte \1", info)

    def read(self, i: int) -> tuple[bytes, int | str]:
        shard, _, offset, size, label_offset, label_size = self.table[i].tolist()
        path = self.shards[shard]
        image, label = (
            self.files.read(path, *place, lambda: self.name(i))
            for place in ((offset, size), (label_offset, label_size))
        )
        return image, number(label)

    def without(self, left_out: Collection[int]) -> "Tars":
        if self.left_out:
            raise ValueError("samples are left out already: numbers would be of another list")
        return Tars(self.shards, left_out)

    def reader(self, dali: Any, order: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        return dali.fn.readers.webdataset(
            paths=list(map(str, self.shards)),
            index_paths=list(map(str, self.indexes)),
            ext=[";".join(IMAGES), "cls"],
            missing_component_behavior="error",
            **same_everywhere(order, buffer=True),
            **options,
        )

    def labels(self, output: Any) -> list[int | str]:
        return [number(bytes(output.at(i))) for i in range(len(output))]

    @cached_property
    def indexes(self) -> list[Path]:
        if not self.left_out:
            return list(map(index_path, self.shards))
        self.directory = tempfile.TemporaryDirectory(prefix="nvcnn-")
        lines = [read_index(shard) for shard in self.shards]
        firsts = list(accumulate(map(len, lines), initial=0))
        skipped = set(self.left_out)
        indexes = []
        for n, texts in enumerate(lines):
            indexes.append(Path(self.directory.name) / f"{n}.idx")
            indexes[-1].write_text(index_text([t for i, t in enumerate(texts, firsts[n]) if i not in skipped]))
        return indexes


def number(label: bytes) -> int | str:
    """A label's number; what is none, as text."""
    text = label.decode(errors="replace").strip()
    return int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else text


def index_text(lines: list[str]) -> str:
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"


def read_index(shard: Path) -> list[str]:
    """A line for each sample. Raises InputError when the file is no index of ours."""
    head, *lines = index_path(shard).read_text().splitlines() or [""]
    if head != f"v1.2 {len(lines)}" or not all(map(LINE.fullmatch, lines)):
        raise InputError(
            f"{index_path(shard)}: is not an index with an image and a label a line: delete it, it is built anew"
        )
    return lines


def plain(name: str) -> str:
    """A member's name as a word of an index's line."""
    return re.sub(r"[\s:]", "_", name)


def samples(shard: Path) -> Iterator[str]:
    """The index's lines. Raises InputError where the tar is cut short, or a sample has not one image and one label."""

    def line(key: str, members: list[tuple[str, tarfile.TarInfo]]) -> str:
        images, labels = ([m for m in members if m[0] in kinds] for kinds in (IMAGES, ("cls",)))
        if len(images) != 1 or len(labels) != 1:
            raise InputError(
                f"{shard}: sample {key} has {len(images)} images (.{', .'.join(IMAGES)}) and {len(labels)} labels "
                "(.cls) side by side, not one of each: make the tar again"
            )
        return " ".join(f"{kind} {m.offset_data} {m.size} {plain(m.name)}" for kind, m in (images[0], labels[0]))

    key = ""
    members: list[tuple[str, tarfile.TarInfo]] = []
    end = shard.stat().st_size
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            directory, _, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            if not member.isfile() or not stem:
                continue
            if member.offset_data + member.size > end:
                raise InputError(f"{shard}: {member.name} is cut short: copy or make the file again")
            if f"{directory}/{stem}" != key and members:
                yield line(key.lstrip("/"), members)
                members = []
            key = f"{directory}/{stem}"
            members.append((kind.lower(), member))
    if members:
        yield line(key.lstrip("/"), members)


def check_index(shard: Path, lenient: bool = False) -> None:
    """Builds the tar's index if it has none; raises InputError if it is not that of this tar."""
    index = index_path(shard)
    if not index.exists():
        print(f"{shard}: no index, building it", file=sys.stderr, flush=True)
        try:
            text = index_text(list(samples(shard)))
        except tarfile.TarError as error:
            raise InputError(f"{shard}: is no tar, or damaged ({error}): copy or make the file again") from None
        try:
            with atomic_writer(index) as file:
                file.write(text.encode())
        except OSError as error:
            raise InputError(
                f"{index}: is missing and cannot be written ({error.strerror}): make {shard.parent} writable once"
            ) from None
    lines = read_index(shard)
    if not lines or lenient:
        return
    numbers = [int(n) for n in LINE.fullmatch(lines[-1]).group(1, 2, 4, 5)]  # type: ignore[union-attr]
    end, size = max(numbers[0] + numbers[1], numbers[2] + numbers[3]), shard.stat().st_size
    if end > size:
        raise InputError(
            f"{index}: ends at byte {end}, but {shard} has {size} bytes: the tar is truncated (copy it again) "
            "or the index is of another file (delete it, it is built anew)"
        )
    with open(shard, "rb") as file:  # a member's header, 512 bytes, is before its data; its size is octal from 124 on
        for offset, length in (numbers[:2], numbers[2:]):
            file.seek(offset - 512 + 124)
            if not re.fullmatch(rb"\s*0*%o[\s\0]*" % length, file.read(12)) and length < 8**11:
                raise InputError(f"{index}: is not that of {shard}: delete it, it is built anew")


def open_tars(directory: Path, split: str, lenient: bool) -> Tars:
    """The tars of a split, in order of name; indexes are checked, missing ones are built."""
    shards = next(filter(None, (sorted(directory.glob(f"{prefix}-*.tar")) for prefix in PREFIXES[split])), [])
    if not shards:
        names = " or ".join(f"{prefix}-*.tar" for prefix in PREFIXES[split])
        raise InputError(f"--data_dir={directory}: no {names} files: prepare the data set, or correct the path")
    for shard in shards:
        check_index(shard, lenient)
    return Tars(shards)
