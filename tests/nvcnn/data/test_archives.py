"""A tar is read to its end, or refused: whatever is damaged, no member is missed without a word."""

import gzip
import io
import tarfile

import pytest

from nvcnn.data.archives import opened
from nvcnn.program import InputError
from tests.samples import add

NAMES = ["a.jpg", "a.cls", f"{'long/' * 40}b.jpg", "b.cls", "c.jpg", "c.cls"]


def tar(names=NAMES, tar_format=tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as archive:
        for i, name in enumerate(names):
            add(archive, name, bytes([65 + i]) * 600 * (i % 3))
    return file.getvalue()


def read(path, data: bytes, **options) -> list[str]:
    path.write_bytes(data)
    with opened(path, "it", "copy it", **options) as archive:
        return [member.name for member in archive]


def headers(data: bytes) -> list[tarfile.TarInfo]:
    return tarfile.open(fileobj=io.BytesIO(data)).getmembers()


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_a_whole_tar_and_of_what_cat_joined(tmp_path, tar_format):
    whole, other = tar(tar_format=tar_format), tar(["d.jpg"])
    assert read(tmp_path / "tar", whole) == NAMES
    assert read(tmp_path / "tar", whole + other + bytes(512)) == [*NAMES, "d.jpg"]
    assert read(tmp_path / "tar", b"x" * 512 + whole + other, at=512, end=512 + len(whole)) == NAMES
    assert read(tmp_path / "tar", tar([])) == []
    assert read(tmp_path / "tar", gzip.compress(whole), compressed=True) == NAMES


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def test_a_bit_of_a_header_is_an_error(tmp_path):
    whole = tar(["a.jpg", "a.cls"])
    *_, last = headers(whole)
    for i in range(0, 512, 3):
        with pytest.raises(InputError, match=rf"it: cannot be read \(no tar header at byte {last.offset}: "):
            read(tmp_path / "tar", flipped(whole, last.offset + i, i % 8))


def test_what_is_not_whole_is_refused(tmp_path):
    whole = tar()
    third, empty, last = (headers(whole)[i] for i in (2, 3, 5))
    end = last.offset_data + last.size
    end += -end % 512
    for data, what in {
        b"": "empty file",
        whole[: third.offset]: f"it ends at byte {third.offset} without a tar's end: it is cut short",
        whole[: third.offset + 100]: f"no tar header at byte {third.offset}: truncated header",
        whole[: third.offset_data + 100]: f"{third.name} is cut short",
        whole[:end]: f"it ends at byte {end} without a tar's end: it is cut short",
        whole[: end + 512]: f"it ends at byte {end + 512} without a tar's end: it is cut short",
        whole[: empty.offset] + bytes(512) + whole[empty.offset + 512 :]: f"at byte {empty.offset}: zeros",
        whole[: third.offset] + bytes(512) + whole[third.offset + 512 :]: f"header at byte {third.offset + 512}",
        whole + b"x" * 512: f"no tar header at byte {len(whole)}: invalid header",
        whole + whole[: third.offset]: f"it ends at byte {len(whole) + third.offset} without a tar's end",
    }.items():
        with pytest.raises(InputError) as error:
            read(tmp_path / "tar", data)
        assert str(error.value).startswith("it: cannot be read ("), what
        assert what in str(error.value)
        assert str(error.value).endswith("): copy it")
    with pytest.raises(InputError, match=r"cannot be read \(no tar header at byte 512: "):
        read(tmp_path / "tar", bytes(512) + flipped(whole, 5), at=512)
    with pytest.raises(InputError, match=r"cannot be read \(c.cls is cut short"):
        read(tmp_path / "tar", whole, end=last.offset_data + 512)


def test_the_checksum_at_the_end_of_a_gzip_file_is_looked_at(tmp_path):
    packed = gzip.compress(tar(), compresslevel=0)
    for data, what in ((flipped(packed, packed.index(b"BBBB")), "CRC check failed"), (packed[:-2], "end-of-stream")):
        with pytest.raises(InputError, match=what):
            read(tmp_path / "tar", data, compressed=True)
