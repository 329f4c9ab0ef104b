"""Of each way in which data can be bad one line is said, by each backend and for each kind of files.

The table of docs/bad-data.md is what is said here: `NVCNN_WRITE_DOCS=1 pytest tests/nvcnn/test_bad_data.py` writes it.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from nvcnn.check_data import check_data, search
from nvcnn.data.backend import choose_backend
from nvcnn.data.dataset import Dataset
from nvcnn.data.shard_source import index_path
from nvcnn.data.tars import Tars
from nvcnn.data.tfrecord import encode_example, read_records
from nvcnn.distributed import Transport
from nvcnn.prepare.encode import png
from nvcnn.program import InputError, Launch
from tests.nvcnn.data import reading
from tests.nvcnn.data.reading import CPU, epoch, training
from tests.samples import WRITERS, file_of, write_shard

DOCS = Path(__file__).parents[2] / "docs/bad-data.md"
ALONE = Transport(Launch())
IMAGES, BAD = 12, 7  # the eighth sample is the bad one
KINDS = tuple(WRITERS)
FILES = {  # of each kind, in two shards or folders
    "records": {"shards": 2},
    "tars": {"shards": 2, "suffix": "jpg", "name": "{:02d}", "others": ()},
    "folders": {"suffix": "jpg", "name": "class{1}/{0:02d}"},
}


def jpeg(i: int) -> bytes:
    noise = Image.frombytes("RGB", (16, 16), bytes((i * 31 + n * 17) % 256 for n in range(768)))
    return file_of(noise.resize((48, 32), Image.Resampling.BICUBIC))


def label_of(kind: str, i: int) -> int:
    return i * 2 // IMAGES if kind == "folders" else i % 2


def write(
    kind: str, directory: Path, images: dict[int, bytes] | None = None, labels: dict[int, object] | None = None
) -> None:
    """Writes twelve images of two classes in two files, or two folders; some with another content or label."""
    stored = {i: label_of(kind, i) + (kind != "folders") for i in range(IMAGES)} | (labels or {})
    encoded = {i: jpeg(i) for i in range(IMAGES)} | (images or {})
    WRITERS[kind](directory, "train", IMAGES, encoded=encoded.get, label=stored.get, **FILES[kind])


def find(kind: str, directory: Path, **options: bool) -> Dataset:
    flags = {} if kind == "folders" else {"num_classes": 2, "label_base": 1}
    return reading.find(directory, **flags, **options)


def grey(value: int, kind: str = "JPEG") -> bytes:
    return file_of(Image.new("L", (48, 32), value), kind)


def shard(directory: Path) -> Path:
    """Returns the second file, where the bad sample is the second one."""
    return next(p for p in sorted(directory.glob("train-00001*")) if p.suffix != ".idx")


def shorter(directory: Path, _: str, *, index: bool) -> None:
    path = shard(directory)
    os.truncate(path, path.stat().st_size * 2 // 3)
    if not index:
        index_path(path).unlink()


def changed(directory: Path, _: str, *, label: bool) -> None:
    """Changes the bad record's last byte, its label, from 2 to 1; or its first, the number of a field."""
    path = shard(directory)
    start, size = map(int, index_path(path).read_text().splitlines()[BAD - IMAGES // 2].split())
    data = bytearray(path.read_bytes())
    data[start + size - 5 if label else start + 12] ^= 3
    path.write_bytes(data)


def other_features(directory: Path, _: str, **features: list) -> None:
    """Writes the bad record anew, with these features."""
    path = shard(directory)
    records = list(read_records(path))
    features = {f"image/{name.replace('__', '/')}": values for name, values in features.items()}
    records[BAD - IMAGES // 2] = encode_example(features)
    write_shard(path, records)


def longer(directory: Path, kind: str) -> None:
    """Puts the other file's samples behind those of the second, as `cat` does."""
    with shard(directory).open("ab") as file:
        file.write(next(p for p in directory.glob("train-00000*") if p.suffix != ".idx").read_bytes())


def damaged_tar(directory: Path, _: str, *, cut: bool) -> None:
    """Cuts it before the bad sample, or changes a bit of that sample's header. The index goes."""
    path = shard(directory)
    data, header = bytearray(path.read_bytes()), Tars([path]).places[0][4 * (BAD - IMAGES // 2)] - 512
    data[header + 1] ^= 1
    path.write_bytes(data[:header] if cut else data)
    index_path(path).unlink()


def unreadable(directory: Path, kind: str) -> None:
    """Puts a link in a circle there, which root cannot read either."""
    path = directory / "train/class1" if kind == "folders" else shard(directory)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(path.name)


def deleted(directory: Path, kind: str) -> None:
    for path in directory.rglob("*.jpg" if kind == "folders" else "train-*"):
        if path.suffix != ".idx":
            path.unlink()


@dataclass
class Case:
    """Damaged content or label of the bad sample, or a `damage` done to the finished files."""

    title: str
    image: bytes | None = None
    label: object = None
    damage: Callable[[Path, str], None] | None = None
    kinds: tuple[str, ...] = KINDS
    while_training: bool = False


CASES = [
    Case("A JPEG cut in the middle", image=jpeg(BAD)[: len(jpeg(BAD)) // 2]),
    Case("An image without bytes", image=b""),
    Case("Something that is not an image", image=b"<html>404 Not Found</html>"),
    Case("A GIF under the name of a JPEG", image=grey(9, "GIF")),
    Case("An image of 30 000 x 30 000 pixels", image=png(b"", 30_000, 30_000)),
    Case("A label outside the classes", label=3, kinds=("records", "tars")),
    Case("A label that is not a number", label="cat", kinds=("tars",)),
    Case("A sample without a label", label="", kinds=("tars",)),
    Case("A record without a label", damage=partial(other_features, encoded=[jpeg(BAD)]), kinds=("records",)),
    Case("A record without an image", damage=partial(other_features, class__label=[1]), kinds=("records",)),
    Case("A record with an empty list of images", damage=partial(other_features, encoded=[]), kinds=("records",)),
    Case(
        "A record with an empty list of labels",
        damage=partial(other_features, encoded=[jpeg(BAD)], class__label=[]),
        kinds=("records",),
    ),
    Case(
        "A record with two labels",
        damage=partial(other_features, encoded=[jpeg(BAD)], class__label=[1, 2]),
        kinds=("records",),
    ),
    Case(
        "A record with two images",
        damage=partial(other_features, encoded=[jpeg(BAD)] * 2, class__label=[1]),
        kinds=("records",),
    ),
    Case("A tar cut between two samples, without an index", damage=partial(damaged_tar, cut=True), kinds=("tars",)),
    Case("A damaged header in a tar, without an index", damage=partial(damaged_tar, cut=False), kinds=("tars",)),
    Case("A file that is longer than its index", damage=longer, kinds=("records", "tars")),
    Case("A file cut short, without an index", damage=partial(shorter, index=False), kinds=("records", "tars")),
    Case("A file that is shorter than its index", damage=partial(shorter, index=True), kinds=("records", "tars")),
    Case("A record with another label than was written", damage=partial(changed, label=True), kinds=("records",)),
    Case("A record that is no tf.train.Example any more", damage=partial(changed, label=False), kinds=("records",)),
    Case("A file or a folder that cannot be read", damage=unreadable),
    Case("Files deleted while training", damage=deleted, while_training=True),
]
WITH = {  # what a row of the table is about -> backend, --check_data, --skip_bad_images
    "DALI": ("dali_cpu", "none", False),
    "`--data_backend=torch`": ("torch", "none", False),
    "`--check_data=images`": ("dali_cpu", "images", False),
    "`--skip_bad_images`": ("dali_cpu", "none", True),
}


def run(directory: Path, kind: str, case: Case, backend: str, check: str, skip: bool) -> tuple[list[str], set[int]]:
    """Returns what train.py prints of the data, and the labels of three epochs, by the functions that it calls."""
    printed: list[str] = []
    labels: set[int] = set()
    try:
        dataset = find(kind, directory, lenient=skip)
        dataset, left_out = check_data(dataset, "train", check, skip, ALONE, 1)
        printed += [f"left out: {line}" for line in left_out]
        data = training(dataset, choose_backend(backend, CPU), batch_size=2)
        if case.while_training:
            case.damage(directory, kind)  # type: ignore[misc]
        for batch in epoch(data) + epoch(data) + epoch(data):
            labels |= set(batch.labels.tolist())
        printed += [] if skip and left_out else ["(trains on)"]
    except InputError as error:
        printed.append(f"train.py: {error}")
    return printed, labels


SHARD = r"DIR/train-0000\d(?:-of-00002|\.tar)"
SAMPLE = rf"{SHARD}: (?:the record|\d\d\.jpg) at byte \d+|DIR/train/class\d/\d\d\.jpg"


def shown(printed: list[str], directory: Path) -> str:
    """Returns the lines with names for the places of a sample, and one line for many that say the same."""
    lines = [line.replace(str(directory), "DIR").replace("|", "\\|") for line in printed]
    return "<br>".join(dict.fromkeys(re.sub(SHARD, "SHARD", re.sub(SAMPLE, "SAMPLE", line)) for line in lines))


def rows(case: Case, directory: Path) -> Iterator[str]:
    """Yields rows of the table: the kinds of files and the flags under which the same is said share a row."""
    said: dict[str, dict[str, list[str]]] = {}
    for kind in case.kinds:
        for n, (flag, how) in enumerate(WITH.items()):
            data = directory / f"{kind}{n}"
            images = {} if case.image is None else {BAD: case.image}
            write(kind, data, images, {} if case.label is None else {BAD: case.label})
            if case.damage and not case.while_training:
                find(kind, data)  # builds the indexes
                case.damage(data, kind)
            printed, labels = run(data, kind, case, *how)
            assert labels <= {0, 1}
            assert not any("\n" in line for line in printed)
            said.setdefault(shown(printed, data), {}).setdefault(flag, []).append(kind)
    for text, flags in said.items():
        of: dict[str, list[str]] = {}
        for flag, kinds in flags.items():
            of.setdefault("all" if len(kinds) == len(KINDS) else ", ".join(kinds), []).append(flag)
        where = "; ".join(f"{kinds}: {', '.join(names)}" for kinds, names in of.items())
        yield f"| {case.title} | {where} | {text} |"


HEAD, TABLE = DOCS.read_text().split("|---|---|---|\n")


def normal(text: str) -> str:
    """Returns the text without sizes and offsets, which follow the version of a JPEG encoder or of zlib."""
    return re.sub(r"\b\d{2,}\b", "N", text)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title.replace(" ", "-"))
def test_what_is_said_is_what_the_page_says(case, tmp_path):
    pytest.importorskip("nvidia.dali")
    found = list(rows(case, tmp_path))
    if os.environ.get("NVCNN_WRITE_DOCS"):
        if case is CASES[0]:
            DOCS.write_text(f"{HEAD}|---|---|---|\n")
        with DOCS.open("a") as file:
            file.writelines(f"{row}\n" for row in found)
    page = [row for row in DOCS.read_text().splitlines() if row.startswith(f"| {case.title} |")]
    assert list(map(normal, page)) == list(map(normal, found))


def test_the_table_has_nothing_else():
    titles = [row.split(" | ")[0].removeprefix("| ") for row in TABLE.splitlines()]
    assert list(dict.fromkeys(titles)) == [case.title for case in CASES]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", reading.BACKENDS)
def test_what_is_left_out_is_the_bad_alone(tmp_path, kind, backend):
    """Two of twelve are bad. The good ones keep their labels: each class has its own grey."""
    good = {i: grey(40 if label_of(kind, i) == 0 else 200) for i in range(IMAGES)}
    write(kind, tmp_path / "data", good | {0: b"", BAD: jpeg(BAD)[:300]})
    dataset, left_out = check_data(find(kind, tmp_path / "data", lenient=True), "train", "none", True, ALONE, 1)
    assert len(left_out) == 2
    assert dataset.count("train") == 10
    data = training(dataset, backend, batch_size=5)
    for _ in range(3):
        batches = epoch(data)
        assert all(((b.images.float().mean((1, 2, 3)) > 120).long() == b.labels).all() for b in batches)
        assert sorted(label for b in batches for label in b.labels.tolist()) == [0] * 5 + [1] * 5


def test_all_bad(tmp_path):
    write("folders", tmp_path / "data", dict.fromkeys(range(IMAGES), b""))
    with pytest.raises(
        InputError, match=r"--data_dir=.*data: all 12 train images are bad, the first: .*00\.jpg.*no bytes"
    ):
        check_data(find("folders", tmp_path / "data"), "train", "none", True, ALONE, 1)


def test_records_are_checked_without_decoding(tmp_path, capsys):
    write("records", tmp_path / "data", {BAD: b"no image"})
    dataset = find("records", tmp_path / "data")
    assert check_data(dataset, "train", "records", False, ALONE, 1) == (dataset, [])
    assert re.fullmatch(r"Checked 12 train images in \d+\.\d s: 0 bad\n", capsys.readouterr().out)
    changed(tmp_path / "data", "records", label=True)
    with pytest.raises(
        InputError, match=r"record at byte \d+ is damaged \(its CRC differs\).* \(1 bad of 12: --skip_bad"
    ):
        check_data(find("records", tmp_path / "data"), "train", "records", False, ALONE, 1)


def test_a_search_by_many_processes_finds_the_same(tmp_path, monkeypatch):
    def refuse(_):
        raise AssertionError("the table of samples is sent to a process")

    write("tars", tmp_path / "data", {1: b"", BAD: b"x"}, {10: "cat"})
    dataset = find("tars", tmp_path / "data")
    monkeypatch.setattr("nvcnn.check_data.PIECE", 2)
    monkeypatch.setattr(Dataset, "__reduce__", refuse)
    one, three = (search(dataset, "train", range(IMAGES), True, n, quiet=True) for n in (1, 3))
    assert [i for i, _ in one] == [1, BAD, 10]
    assert sorted(three) == one


def test_a_search_whose_process_is_killed(tmp_path, monkeypatch):
    write("folders", tmp_path / "data")
    monkeypatch.setattr("nvcnn.check_data.PIECE", 2)
    monkeypatch.setattr("nvcnn.check_data.bad_samples", lambda *_, images: os._exit(9))
    with pytest.raises(InputError, match="a worker process was killed, perhaps for lack of memory: give"):
        search(find("folders", tmp_path / "data"), "train", range(IMAGES), True, 2, quiet=True)


def test_a_search_ends_at_ctrl_c(tmp_path, monkeypatch):
    """It does not end after all pieces: those of ImageNet take the better part of an hour."""

    pieces = []

    def ctrl_c(pending):
        pieces.extend(pending)
        raise KeyboardInterrupt

    write("folders", tmp_path / "data")
    monkeypatch.setattr("nvcnn.check_data.PIECE", 1)
    monkeypatch.setattr("nvcnn.check_data.bad_samples", lambda *_, images: time.sleep(0.01))
    monkeypatch.setattr("nvcnn.check_data.as_completed", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        search(find("folders", tmp_path / "data"), "train", range(500), True, 2, quiet=True)
    assert any(piece.cancelled() for piece in pieces)


def test_ranks_share_the_search_and_agree(tmp_path):
    write("folders", tmp_path / "data", {1: b"", 5: b"y", BAD: b"x"})
    dataset = find("folders", tmp_path / "data")

    class Three(Transport):
        """The other ranks have searched already."""

        def gather(self, value):
            assert [i for i, _ in value] == [1, BAD]  # 5 is not in its share 1, 4, 7, 10
            return [[(6, "of rank 0")], value, [(5, "of rank 2")]]

    found, left_out = check_data(dataset, "train", "none", True, Three(Launch(rank=1, size=3)), 1)
    assert found.count("train") == 8
    assert left_out[1:3] == ["of rank 2", "of rank 0"]


def test_a_directory_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    write("folders", tmp_path / "data")
    with monkeypatch.context() as patch:  # root may read everywhere
        patch.setattr("nvcnn.data.dataset.os.listdir", refuse)
        with pytest.raises(InputError, match=r"--data_dir=.*data: Permission denied"):
            find("folders", tmp_path / "data")
    monkeypatch.setattr("nvcnn.data.class_folders.os.scandir", refuse)
    with pytest.raises(InputError, match=r"data/train: cannot be read \(Permission denied\)"):
        find("folders", tmp_path / "data")
