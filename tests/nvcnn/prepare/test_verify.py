"""--verify finds what is not as it was written, and names it."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from nvcnn.data.shard_source import index_path
from nvcnn.data.tfrecord import read_records, write_record
from nvcnn.prepare.manifest import as_json, read_manifest, summed
from nvcnn.prepare.verify import verify
from nvcnn.program import InputError
from tests.nvcnn.prepare.preparing import flip


def second_record(shard: Path) -> int:
    return int(index_path(shard).read_text().splitlines()[1].split()[0])


SHARD = "train-00003-of-00006"
OURS = r"manifest\.json: was not written by prepare\.py"


def change(path: Path, what) -> None:
    text = json.loads(path.read_text())
    what(text)
    path.write_bytes(summed(text) if "sha256" in text else as_json(text))


def rewritten(shard: Path) -> None:
    """Writes the same records in another order, so that CRCs and size are right."""
    records = list(read_records(shard))
    with open(shard, "wb") as file:
        for record in records[::-1]:
            write_record(file, record)


BROKEN = {  # what is done to a data directory, and the words of the message
    "pixel": (lambda d: flip(d / SHARD, second_record(d / SHARD) + 900), rf"{SHARD}: record 1 at byte \d+ is damaged"),
    "length": (lambda d: flip(d / SHARD, second_record(d / SHARD)), rf"{SHARD}: no TFRecord at byte \d+ \(record 1\)"),
    "cut": (lambda d: os.truncate(d / SHARD, (d / SHARD).stat().st_size - 9), rf"{SHARD}: record \d+ at .* cut short"),
    "longer": (lambda d: (d / SHARD).open("ab").write(b"x"), rf"{SHARD}: no TFRecord at byte .*record 8"),
    "one less": (
        lambda d: os.truncate(d / SHARD, second_record(d / SHARD)),
        rf"{SHARD}: has \d+ bytes, not the \d+ of manifest\.json at record 1:",
    ),
    "missing": (lambda d: (d / SHARD).unlink(), rf"{SHARD}: cannot be read \(No such file"),
    "index missing": (lambda d: (d / f"{SHARD}.idx").unlink(), rf"{SHARD}\.idx: cannot be read \(No such file"),
    "index": (lambda d: flip(d / f"{SHARD}.idx", 8), rf"{SHARD}\.idx: is wrong at record 1"),
    "no text": (lambda d: (d / f"{SHARD}.idx").write_bytes(b"0 \x9b"), rf"{SHARD}\.idx: is wrong at record 0"),
    "other": (lambda d: rewritten(d / SHARD), rf"{SHARD}: holds other records than were written"),
    "extra": (lambda d: (d / "train-00012-of-00013").touch(), r"train-00012-of-00013: is not in manifest\.json"),
    "dataset": (
        lambda d: change(d / "dataset.json", lambda text: text["images"].update(validation=24)),
        r"dataset\.json: its images are not",
    ),
    "labels": (
        lambda d: change(d / "dataset.json", lambda text: text.update(label_base=0)),
        r"dataset\.json: is missing, or not as it was written",
    ),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), r"manifest\.json: is missing"),
    "other manifest": (lambda d: (d / "manifest.json").write_text("[]"), OURS),
    "another manifest": (lambda d: change(d / "manifest.json", lambda text: text["made_from"].pop("format")), OURS),
    "a part less": (lambda d: change(d / "manifest.json", lambda text: text["shards"][SHARD].pop("bytes")), OURS),
    "a bit of the manifest": (
        lambda d: flip(d / "manifest.json", (d / "manifest.json").read_bytes().index(b'"source"') + 20),
        r"manifest\.json: is damaged \(its SHA-256 differs\)",
    ),
    "manifest cut": (lambda d: os.truncate(d / "manifest.json", 99), r"manifest\.json: cannot be read"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_verify_names_what_is_not_as_written(copy, broken):
    damage, what = BROKEN[broken]
    damage(copy)
    with pytest.raises(InputError, match=what) as error:
        verify(copy, 1)
    assert "\n" not in str(error.value)


def test_verify_names_the_first_bad_shard_and_prints_all(copy, capfd):
    verify(copy, 2)
    assert "8 shards with 73 images are as they were written" in capfd.readouterr().out
    names = (SHARD, "train-00002-of-00006", "validation-00001-of-00002")
    for name in names:
        flip(copy / name, 100)
    with pytest.raises(InputError, match=r"train-00002-of-00006: record 0 .* \(3 of 8 shards, listed above\)"):
        verify(copy, 2)
    printed = capfd.readouterr().out
    assert all(f"{copy / name}: record 0 at byte 0 is damaged" in printed for name in names)


def test_every_byte_of_the_manifest_counts(prepared, tmp_path):
    data = (prepared / "manifest.json").read_bytes()
    for at in range(0, len(data), 11):
        (tmp_path / "manifest.json").write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 7]) + data[at + 1 :])
        with pytest.raises(InputError, match=r"manifest\.json: (is damaged|cannot be read|was not written)"):
            read_manifest(tmp_path / "manifest.json")


def test_a_manifest_without_the_sums_of_other_files(copy):
    """Directories that were made before the sums were added have such a manifest."""
    change(copy / "manifest.json", lambda text: (text.pop("files"), text.pop("sha256")))
    verify(copy, 1)
    (copy / "dataset.json").unlink()
    with pytest.raises(InputError, match=r"dataset\.json: its images are not"):
        verify(copy, 1)


def test_webdataset_is_verified(tars, tmp_path):
    verify(tars, 2)
    path = shutil.copytree(tars, tmp_path / "copy") / f"{SHARD}.tar"
    with tarfile.open(path) as tar:
        third = [member for member in tar if member.name.endswith("cls")][2]
    for at, what in (
        (third.offset_data, r"holds other records than were written \("),
        (third.offset + 3, rf"cannot be read \(no tar header at byte {third.offset}: bad checksum\)"),
    ):
        flip(path, at)
        with pytest.raises(InputError, match=rf"{SHARD}\.tar: {what}"):
            verify(path.parent, 1)
