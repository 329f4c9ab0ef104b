"""What strangers can write is refused in one line: the seeds of the search, what it has found, and what is known."""

import gzip
import io
import pickle
import re
import struct
import tarfile
import tracemalloc
from contextlib import suppress

import pytest

from nvcnn.program import InputError

pytest.importorskip("google_crc32c")
pytest.importorskip("safetensors")
pytest.importorskip("scipy")
pytest.importorskip("yaml")
import torch

from nvcnn.data.archives import content, opened
from nvcnn.prepare import fashion_mnist
from tests.fuzz import targets
from tests.fuzz.targets import TARGETS, saved, state
from tests.samples import add

BY_NAME = {target.__name__: target for target in TARGETS}


def refused(target, data: bytes, folder) -> None:
    """Gives the bytes to a target, which may refuse them."""
    with suppress(*targets.REFUSED):
        target(data, folder)


@pytest.mark.parametrize("target", TARGETS, ids=BY_NAME)
def test_seeds(target, tmp_path):
    for seed in TARGETS[target](tmp_path):
        refused(target, seed, tmp_path)
        refused(target, seed[: len(seed) // 2], tmp_path)


def header(**changes) -> bytes:
    member = tarfile.TarInfo("0.jpg")
    for name, value in changes.items():
        setattr(member, name, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def pax(**values: str) -> bytes:
    member = tarfile.TarInfo("0.jpg")
    member.pax_headers = values
    return member.tobuf(tarfile.PAX_FORMAT)


HOSTILE = [
    # A size below 0 sends tarfile back to the same header, for ever; it reads names and PAX's whole.
    ("archive", header() + header(size=-512) + bytes(2048)),
    ("archive", header() + pax(size="-1536") + bytes(2048)),
    ("archive", header(type=tarfile.XHDTYPE, size=1 << 40) + bytes(1024)),
    ("archive", header(type=tarfile.GNUTYPE_LONGNAME, size=1 << 40) + bytes(1024)),
    ("archive", header(type=tarfile.XHDTYPE, size=0) * 3000),  # each is read within the one before
    ("archive", pax(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}) + bytes(2048)),
    ("tar", header(size=1 << 62) + bytes(1024)),
    # Numbers that Python reads and 64 bits do not hold, or that Python refuses to read.
    ("tfrecord_index", b"0 " + b"9" * 30 + b"\n"),
    ("tfrecord_index", b"0 " + b"9" * 5000 + b"\n"),
    ("tfrecord_index", b"0 " + b"9" * 18 + b"\n"),
    ("tfrecord_index", b"0 7\n7 4242772\n"),  # a record shorter than what is around its data
    ("tar_index", b"v1.2 1\njpg 512 " + b"9" * 30 + b" 0.jpg cls 2048 1 0.cls\n"),
    ("example", b"\x0a" + b"\xff" * 10_000),
    ("recipe", b"learning_rate: " + b"[" * 600),
    ("recipe", b'model: "\\UFFFFFFFF"'),
    ("recipe", b"%YAML " + b"9" * 5000 + b".1\n---\nmodel: lenet\n"),
    ("dataset_json", b"[" * 100_000),
    ("dataset_json", b'{"num_classes": 1e99}'.replace(b"1e99", b"9" * 30)),
    ("manifest_json", b"[" * 100_000),
    ("manifest_json", b'{"made_from": {"format": []}, "images": {}, "shards": {}}'),
    ("safetensors_file", targets.safetensors({"a": torch.zeros(2)}, {"nvcnn": "[" * 100_000})),
    ("cifar", b"\x80\x02Nr\xff\xff\xff\x0f."),  # a place in the memo for which 4 GB would be taken
    ("cifar", b"\x96" + (1 << 32).to_bytes(8, "little") + b"1"),  # a bytearray of 4 GB
    ("cifar", b"cos\nsystem\n(S'touch hacked'\ntR."),
    ("cifar", targets.batches()[-1].replace(b"NNNJ", b"NN0J")),  # numpy crashes at this state of a dtype
    # The same text made bytes a thousand times.
    ("cifar", b"c_codecs\nencode\np0\n0(V" + b"a" * 100_000 + b"\nVlatin1\ntp1\n0(" + b"h\0h\1R" * 1000 + b"l."),
    ("image", b"RIFF:\0\0\0WEBPVP8 .\0\0\0\xf0\1\0\x9d\1*\x106x\x9b>9\x80\0"),  # large, and cut short
    ("torch_file", saved({"format": "nvcnn checkpoint"})),
    ("torch_file", re.sub(rb"(PK\x06\x07.{12})\x01", rb"\g<1>M", saved(state()), flags=re.DOTALL)),  # of 77 parts
    ("torch_file", saved(state() | {"weights": [1]})),
    ("torch_file", saved(state() | {"options": {"width": 1 << 40}})),
    ("torch_file", saved(state() | {"options": {"padding": 1 << 40}})),
    ("torch_file", saved(state() | {"model": []})),
]


FOUND = sorted((targets.ROOT / "found").glob("*-*"))
HOSTILE += [(path.name.partition("-")[0], path.read_bytes()) for path in FOUND]


@pytest.mark.parametrize(("name", "data"), HOSTILE, ids=[f"{name}-{n}" for n, (name, _) in enumerate(HOSTILE)])
def test_what_is_hostile(name, data, tmp_path):
    tracemalloc.start()
    try:
        refused(BY_NAME[name], data, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_a_pickle_of_cifar_calls_nothing_else(tmp_path):
    with pytest.raises(pickle.UnpicklingError, match=r"wants os\.system"):
        targets.cifar10.parse_batch("data_batch_1", b"cos\nsystem\n(S'true'\ntR.")


def test_what_a_compressed_file_holds_is_bounded(tmp_path, monkeypatch):
    """A gigabyte of zeros is a megabyte of gzip."""
    name, zeros = next(iter(fashion_mnist.SHA256)), bytes(20_000_000)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(zeros, 1))
    monkeypatch.setattr(fashion_mnist, "LARGEST", 1000)
    tracemalloc.start()
    with pytest.raises(InputError, match="SHA-256 differs"):
        fashion_mnist.read_idx(tmp_path, name)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        add(tar, "small", b"12")
        add(tar, "large", zeros)
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (tmp_path / "tar.gz").write_bytes(file.getvalue())
    with opened(tmp_path / "tar.gz", "it", "get it again", compressed=True) as tar:
        assert content(tar, tar.next(), 2) == b"12"
    for n, what in (0, "small is no file of at most 1 bytes"), (1, "large is no file of"), (2, "link is a link"):
        with (
            pytest.raises(InputError, match=rf"it: cannot be read \({what}"),
            opened(tmp_path / "tar.gz", "it", "get it again", compressed=True) as tar,
        ):
            content(tar, tar.getmembers()[n], 1)


def test_a_number_of_many_bytes_is_none():
    """Protocol buffers have ten at most; reading more takes time by their square."""
    with pytest.raises(InputError, match="a number of more than ten bytes"):
        targets.example(b"\x0a" + b"\xff" * 100 + b"\x01", None)


def test_a_length_of_a_record_is_no_memory(tmp_path):
    """The length is right by its CRC, and says 2**63 bytes."""
    (tmp_path / "train-0").write_bytes(struct.pack("<QI", 1 << 63, 0) + bytes(100))
    with targets.without_sums(), pytest.raises(InputError, match="record 0 at byte 0 is cut short"):
        targets.Records.find(tmp_path, "train")
