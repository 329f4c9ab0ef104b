"""CIFAR-10 is prepared from small files of both of its formats."""

import gzip
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest

from nvcnn.prepare import cifar10
from nvcnn.prepare.write import write_dataset
from nvcnn.program import InputError
from tests.nvcnn.prepare.preparing import examples, opened
from tests.samples import add

NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def batch(name: str) -> tuple[np.ndarray, list[int]]:
    """Returns planar pixels, (8, 3072), and labels."""
    random = np.random.default_rng(NAMES.index(name))
    return random.integers(0, 256, (8, 3072), dtype=np.uint8), random.integers(0, 10, 8).tolist()


def files(binary: bool) -> dict[str, bytes]:
    found = {"batches.meta.txt" if binary else "batches.meta": b"not read"}
    for name in NAMES:
        pixels, labels = batch(name)
        if binary:
            found[f"{name}.bin"] = b"".join(bytes([label, *image]) for image, label in zip(pixels, labels, strict=True))
        else:
            batch_label = name.encode()
            found[name] = pickle.dumps({b"data": pixels, b"labels": labels, b"batch_label": batch_label}, protocol=2)
    return found


def archive(path, binary: bool, **changes: bytes | None):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in (files(binary) | changes).items():
            if data is not None:
                add(tar, f"cifar-10-batches-{'bin' if binary else 'py'}/{name}", data)
    return path


@pytest.mark.parametrize(("unpacked", "binary"), [(True, True), (False, False)])
def test_every_image_with_its_label(tmp_path, unpacked, binary):
    source = archive(tmp_path / "cifar.tar.gz", binary)
    if unpacked:
        with tarfile.open(source) as tar:
            tar.extractall(tmp_path / "unpacked")
        source = tmp_path / "unpacked"
    write_dataset(cifar10.blueprint(source), tmp_path / "out", workers=2)
    for split, names in (("train", NAMES[:5]), ("validation", NAMES[5:])):
        stored = []
        for example in examples(tmp_path / "out", split):
            image = opened(example["image/encoded"][0])
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
            label = example["image/class/label"][0]
            assert example["image/class/text"] == [cifar10.CLASS_NAMES[label - 1].encode()]
            stored.append((np.asarray(image).tobytes(), label))
        expected = [
            (pixels.reshape(3, 32, 32).transpose(1, 2, 0).tobytes(), label + 1)
            for name in names
            for pixels, label in zip(*batch(name), strict=True)
        ]
        assert sorted(stored) == sorted(expected)
        assert stored != expected


def test_a_batch_as_python_2_and_numpy_1_wrote_it():
    """The archive on the web is: texts are bytes, and numpy's module has another name."""
    pixels, labels = batch(NAMES[0])
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R(K\1K\x08M\0\x0c\x86"
    dtype = b"cnumpy\ndtype\nU\2u1K\0K\1\x87R(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89"
    data = b"T" + struct.pack("<I", pixels.nbytes) + pixels.tobytes() + b"tb"
    numbers = b"U\6labels](" + b"".join(b"K%c" % label for label in labels) + b"e"
    written = b"\x80\2}(U\4data" + array + dtype + data + numbers + b"u."
    assert pickle.loads(written, encoding="bytes")[b"data"].tolist() == pixels.tolist()
    assert cifar10.parse_batch(NAMES[0], written) == [
        (one.tobytes(), label) for one, label in zip(pixels, labels, strict=True)
    ]
    for wrong in written.replace(b"U\2u1", b"U\2i1"), written.replace(b"tb\x89", b"tb\x88"):
        with pytest.raises(ValueError, match="its pixels are not bytes, row by row"):
            cifar10.parse_batch(NAMES[0], wrong)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/evil",)


@pytest.mark.parametrize(
    ("binary", "changes", "what"),
    [
        (True, {"test_batch.bin": None}, "holds no data_batch_1 to 5 and test_batch"),
        (True, {"test_batch.bin": bytes(3072)}, r"test_batch\.bin is not a batch of CIFAR-10 \(3072 bytes"),
        (True, {"data_batch_2.bin": b"\x0a" + bytes(3072)}, r"data_batch_2\.bin has label 10"),
        (False, {"data_batch_2": b"pickle"}, "data_batch_2 is not a batch of CIFAR-10"),
        (False, {"data_batch_2": pickle.dumps(Evil())}, r"data_batch_2 is not a batch .*wants posix\.system"),
        (False, {"data_batch_2": pickle.dumps(np.load)}, r"data_batch_2 is not a batch .*wants numpy\.load"),
        (False, {"data_batch_2": pickle.dumps({b"data": np.zeros(9, np.uint8), b"labels": [1]})}, "1 labels, but 9"),
    ],
)
def test_damaged_archives(tmp_path, binary, changes, what):
    source = archive(tmp_path / "cifar.tar.gz", binary, **changes)
    with pytest.raises(InputError, match=rf"--source={source}: .*{what}") as error:
        cifar10.blueprint(source)
    assert "\n" not in str(error.value)


def test_what_is_no_archive(tmp_path):
    with pytest.raises(InputError, match=r"--source=.*absent: cannot be read \(No such file"):
        cifar10.blueprint(tmp_path / "absent")
    (tmp_path / "other.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(InputError, match=r"--source=.*other\.gz: cannot be read"):
        cifar10.blueprint(tmp_path / "other.gz")
    cut = archive(tmp_path / "cut.tar.gz", binary=True)
    cut.write_bytes(cut.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"--source=.*cut\.tar\.gz: (cannot be read|holds no)"):
        cifar10.blueprint(cut)
    flipped = archive(tmp_path / "flipped.tar.gz", binary=True)
    data = bytearray(gzip.compress(gzip.decompress(flipped.read_bytes()), compresslevel=0))
    data[2000] ^= 1  # a pixel
    flipped.write_bytes(data)
    with pytest.raises(InputError, match=r"--source=.*flipped\.tar\.gz: cannot be read \(CRC check failed"):
        cifar10.blueprint(flipped)
    with pytest.raises(InputError, match="holds no data_batch_1"):
        cifar10.blueprint(tmp_path)
