"""WebDataset's tars, `train-*.tar` and `validation-*.tar` or `val-*.tar`, as a source.

A sample is KEY.jpg (or jpeg, png) and KEY.cls, a decimal number, side by side. Each tar has an index in the format of
DALI's wds2idx, with only these two members in it:

    v1.2 SAMPLES
    jpg OFFSET SIZE NAME cls OFFSET SIZE NAME
"""

import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nvcnn.data.shard_source import ShardSource, does_not_fit, index_path
from nvcnn.program import InputError

PATTERNS = {"train": ("train-*.tar",), "validation": ("validation-*.tar", "val-*.tar")}
IMAGES = ("jpg", "jpeg", "png")


class Tars(ShardSource):
    patterns = PATTERNS
    header = "v1.2 {}\n"
    line = re.compile(rf"(?:{'|'.join(IMAGES)}) (\d+) (\d+) \S+ cls (\d+) (\d+) \S+")

    @staticmethod
    def scan(shard: Path) -> Iterator[str]:
        """Raises InputError also for a sample that does not have exactly one image and one label."""
        try:
            for key, members in samples(shard):
                images, labels = ([m for m in members if m[0] in kinds] for kinds in (IMAGES, ("cls",)))
                if len(images) != 1 or len(labels) != 1:
                    raise InputError(
                        f"{shard}: sample {key} has {len(images)} images (.{', .'.join(IMAGES)}) and {len(labels)} "
                        "labels (.cls) side by side, not one of each: make the tar again"
                    )
                words = ((kind, m.offset_data, m.size, word(m.name)) for kind, m in images + labels)
                yield " ".join(f"{kind} {offset} {size} {name}" for kind, offset, size, name in words)
        except tarfile.TarError as error:
            raise InputError(f"{shard}: is not a tar, or is damaged ({error}): copy or make the file again") from None

    @staticmethod
    def check_end(shard: Path, last: Sequence[int]) -> None:
        ends = [offset + size for offset, size in zip(last[::2], last[1::2], strict=True)]
        if max(ends, default=0) > shard.stat().st_size:
            raise does_not_fit(shard, max(ends))
        with open(shard, "rb") as file:
            for offset, size in zip(last[::2], last[1::2], strict=True):
                # A member's header is the 512 bytes before its data; its size is octal, from byte 124 on.
                file.seek(offset - 512 + 124)
                if not re.fullmatch(rb"\s*0*%o[\s\0]*" % size, file.read(12)) and size < 8**11:
                    raise InputError(f"{index_path(shard)}: is not that of {shard}: delete it, it is built anew")

    def name(self, i: int) -> str:
        shard, line, numbers = self.locate(i)
        return f"{shard}: {self.read_index(shard)[line][0].split()[3]} at byte {numbers[0]}"

    def place(self, info: str) -> str:
        return re.sub(r":(\d+):([^:]*)$", r": \2 at byte \1", info)

    def read(self, i: int) -> tuple[bytes, int | str]:
        image, label = self.read_pieces(i)
        return image, number(label)

    def reader(self, dali: Any, order: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        shards, indexes, order = self.dali_files(order)
        return dali.fn.readers.webdataset(
            paths=shards,
            index_paths=indexes,
            ext=[";".join(IMAGES), "cls"],
            missing_component_behavior="error",
            **order,
            **options,
        )

    def labels(self, output: Any) -> list[int | str]:
        return [number(bytes(output.at(i))) for i in range(len(output))]


def word(name: str) -> str:
    """Returns a member's name as one word of UTF-8, as an index has it; names are there for messages alone."""
    return re.sub(r"[\s:]", "_", name).encode(errors="replace").decode()


def number(label: bytes) -> int | str:
    """Returns the number that a label is, or its text when it is not a number."""
    text = label.decode(errors="replace").strip()
    return int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else text


def samples(shard: Path) -> Iterator[tuple[str, list[tuple[str, tarfile.TarInfo]]]]:
    """Yields the key of each sample, and its files with their extensions. Raises InputError where the tar is cut."""
    key = ""
    members: list[tuple[str, tarfile.TarInfo]] = []
    end = shard.stat().st_size
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            directory, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if not member.isfile() or not stem:
                continue
            if member.offset_data + member.size > end:
                raise InputError(f"{shard}: {member.name} is cut short: copy or make the file again")
            if f"{directory}/{stem}" != key and members:
                yield key.lstrip("/"), members
                members = []
            key = f"{directory}/{stem}"
            members.append((extension.lower(), member))
    if members:
        yield key.lstrip("/"), members
