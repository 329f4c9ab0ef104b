"""WebDataset's tars, `train-*.tar` and `validation-*.tar`, as a source.

A sample is KEY.jpg (or .png, .webp, ... as in class folders) and KEY.cls, a decimal number, side by side; other files
are passed over. Each tar has an index in the format of DALI's wds2idx, with only these two members in it:

    v1.2 SAMPLES
    jpg OFFSET SIZE NAME cls OFFSET SIZE NAME
"""

import math
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from nvcnn.data.archives import Archive, is_file, opened
from nvcnn.data.class_folders import SUFFIXES
from nvcnn.data.shard_source import PLACE, ShardSource, does_not_fit, index_path
from nvcnn.program import InputError

IMAGES, LABELS = tuple(suffix[1:] for suffix in SUFFIXES), ("cls",)
BLOCK = tarfile.BLOCKSIZE
SMALLEST = 4 * BLOCK  # bytes of a sample: two headers, two files
AGAIN = "copy or make the file again"


class Tars(ShardSource):
    header = "v1.2 {}\n"
    line = re.compile(rf"(?:{'|'.join(IMAGES)}) {PLACE} {PLACE} \S+ cls {PLACE} {PLACE} \S+")

    @staticmethod
    def patterns(name: str) -> list[str]:
        return [f"{name}-*.tar"]

    @staticmethod
    def scan(shard: Path) -> Iterator[str]:
        """Raises InputError also for a sample that does not have exactly one image and one label."""
        with opened(shard, str(shard), AGAIN) as tar:
            for key, found in groupby(members(tar), lambda member: member[0]):
                sample = [(extension, member) for _, extension, member in found]
                images, labels = ([m for m in sample if m[0] in kinds] for kinds in (IMAGES, LABELS))
                if len(images) != 1 or len(labels) != 1:
                    raise InputError(
                        f"{shard}: sample {key.lstrip('/')} has {len(images)} images (.{', .'.join(IMAGES)}) and "
                        f"{len(labels)} labels (.cls) side by side, not one of each: make the tar again"
                    )
                words = ((kind, m.offset_data, m.size, word(m.name)) for kind, m in images + labels)
                yield " ".join(f"{kind} {offset} {size} {name}" for kind, offset, size, name in words)

    @staticmethod
    def check_index(shard: Path, numbers: Sequence[int], lenient: bool) -> None:
        """Looks at the tar's headers behind the last sample but one, and wherever there is room for another sample."""
        pieces = sorted(zip(numbers[::2], numbers[1::2], strict=True))
        end = max(map(sum, pieces), default=0)
        if end > shard.stat().st_size:
            if lenient:
                return  # what is not there is found when it is read
            raise does_not_fit(shard, end)
        at = 0
        with opened(shard, str(shard), AGAIN) as tar:
            for offset, size in pieces[:-2]:
                if not BLOCK <= offset - at < BLOCK + SMALLEST and places(tar, at, offset) != [(offset, size)]:
                    break
                at = offset + math.ceil(size / BLOCK) * BLOCK
            else:
                if places(tar, at) == pieces[-2:]:
                    return
        raise InputError(f"{index_path(shard)}: is not that of {shard} from byte {at} on: delete it, it is built anew")

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
    return int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else text


def parts(member: tarfile.TarInfo) -> tuple[str, str]:
    """Returns a member's key, as WebDataset has it, and its extension."""
    directory, _, base = member.name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{directory}/{stem}" if stem else "", extension.lower()


def members(tar: Archive) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yields key, extension and place of each image and label that follows."""
    while member := tar.next():
        key, extension = parts(member)
        if key and extension in IMAGES + LABELS and is_file(member):
            yield key, extension, member


def places(tar: Archive, at: int, last: float = math.inf) -> list[tuple[int, int]]:
    """Returns offset and size of the images and labels whose headers lie from byte `at` to `last`."""
    found: list[tuple[int, int]] = []
    tar.move(at)
    for _, _, member in members(tar):
        found.append((member.offset_data, member.size))
        if member.offset_data >= last:
            break
    return found
