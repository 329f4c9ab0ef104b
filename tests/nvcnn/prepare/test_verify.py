"""What --verify finds, and how it names it."""

import json
import os
import tarfile
from pathlib import Path

import pytest

from nvcnn.data.shard_source import index_path
from nvcnn.data.tfrecord import read_records, write_record
from nvcnn.prepare.verify import verify
from nvcnn.program import InputError
from tests.nvcnn.prepare.preparing import contents, flip


def second_record(shard: Path) -> int:
    return int(index_path(shard).read_text().splitlines()[1].split()[0])


SHARD = "train-00007-of-00012"
BROKEN = {
    "pixel": (lambda d: flip(d / SHARD, second_record(d / SHARD) + 900), rf"{SHARD}: record 1 at byte \d+ is damaged"),
    "length": (lambda d: flip(d / SHARD, second_record(d / SHARD)), rf"{SHARD}: no TFRecord at byte \d+ \(record 1\)"),
    "cut": (lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size - 9), rf"{SHARD}: record \d+ at .* cut short"),
    "longer": (lambda d: (d / SHARD).open("ab").write(b"x"), rf"{SHARD}: no TFRecord at byte .*record 13"),
    "one less": (
        lambda d: os.truncate(d / SHARD, second_record(d / SHARD)),
        rf"{SHARD}: has \d+ bytes, not the \d+ of manifest\.json at record 1:",
    ),
    "missing": (lambda d: (d / SHARD).unlink(), rf"{SHARD}: cannot be read \(No such file"),
    "index missing": (lambda d: (d / f"{SHARD}.idx").unlink(), rf"{SHARD}\.idx: cannot be read \(No such file"),
    "index": (lambda d: flip(d / f"{SHARD}.idx", 8), rf"{SHARD}\.idx: is wrong at record 1"),
    "other": (lambda d: rewritten(d / SHARD), rf"{SHARD}: holds other records than were written"),
    "extra": (lambda d: (d / "train-00012-of-00013").touch(), r"train-00012-of-00013: is not in manifest\.json"),
    "dataset": (
        lambda d: (d / "dataset.json").write_text((d / "dataset.json").read_text().replace("23", "24")),
        r"dataset\.json: its images are not",
    ),
    "labels": (
        lambda d: (d / "dataset.json").write_text((d / "dataset.json").read_text().replace('base": 1', 'base": 0')),
        r"dataset\.json: is missing, or not as it was written",
    ),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), r"manifest\.json: is missing"),
    "other manifest": (
        lambda d: (d / "manifest.json").write_text("[]"),
        r"manifest\.json: was not written by prepare\.py",
    ),
    "another manifest": (
        lambda d: change_manifest(d, lambda text: text["made_from"].pop("format")),
        r"manifest\.json: was not written by prepare\.py",
    ),
    "a part less": (
        lambda d: change_manifest(d, lambda text: text["shards"][SHARD].pop("bytes")),
        r"manifest\.json: was not written by prepare\.py",
    ),
    "manifest cut": (lambda d: os.truncate(d / "manifest.json", 99), r"manifest\.json: cannot be read"),
}


def change_manifest(directory: Path, change) -> None:
    text = json.loads((directory / "manifest.json").read_text())
    change(text)
    (directory / "manifest.json").write_text(json.dumps(text))


def rewritten(shard: Path) -> None:
    """The same records in another order, CRCs and size right."""
    records = list(read_records(shard))
    with open(shard, "wb") as file:
        for record in records[::-1]:
            write_record(file, record)


@pytest.mark.parametrize("broken", BROKEN)
def test_verify_names_what_is_not_as_written(copy, broken):
    verify(copy, 2)
    spoil, what = BROKEN[broken]
    spoil(copy)
    with pytest.raises(InputError, match=what) as error:
        verify(copy, 2)
    assert "\n" not in str(error.value)


def test_verify_names_the_first_bad_shard_and_prints_all(copy, capfd):
    names = (SHARD, "train-00002-of-00012", "validation-00003-of-00004")
    for name in names:
        flip(copy / name, 100)
    with pytest.raises(InputError, match=r"train-00002-of-00012: record 0 .* \(3 of 16 shards, listed above\)"):
        verify(copy, 2)
    printed = capfd.readouterr().out
    assert all(f"{copy / name}: record 0 at byte 0 is damaged" in printed for name in names)


def test_a_manifest_without_the_sums_of_other_files(copy):
    """As directories have it that were made before they were added."""
    change_manifest(copy, lambda text: text.pop("files"))
    verify(copy, 1)
    (copy / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"dataset\.json: its images are not"):
        verify(copy, 1)


def test_webdataset_is_verified(tars, tmp_path):
    verify(tars, 2)
    for name, data in contents(tars).items():
        (tmp_path / name).write_bytes(data)
    path = tmp_path / "train-00003-of-00012.tar"
    with tarfile.open(path) as tar:
        third = [member for member in tar if member.name.endswith("cls")][2]
    flip(path, third.offset_data)
    with pytest.raises(InputError, match=r"train-00003-of-00012\.tar: holds other records than were written \("):
        verify(tmp_path, 1)
    flip(path, third.offset + 3)
    with pytest.raises(InputError, match=r"train-00003-of-00012\.tar: holds other records .* at record 2 "):
        verify(tmp_path, 1)
