"""Tars, read to the last byte: Python's tarfile alone ends without a word at a header that is damaged, zeroed or cut.

Behind a tar's last member are two blocks of zeros at least. Another tar may follow, as `cat` joins them.
"""

import math
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from lzma import LZMAError
from pathlib import Path
from typing import Any

from nvcnn.files import to_read
from nvcnn.program import InputError


class Header(tarfile.TarInfo):
    """A header that is damaged is an error, wherever it is."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "Header":
        header = super().frombuf(buf, encoding, errors)
        # tarfile goes back by a size below 0, for ever, and reads names and the like whole, of whatever size.
        if not 0 <= header.size < 1 << 62 or (not header.isfile() and header.size > LONGEST):
            size = f"a size of {header.size}" + f", {LONGEST} at most" * (header.size > 0)
            raise tarfile.InvalidHeaderError(size)  # type: ignore[attr-defined]
        return header

    @classmethod
    def fromtarfile(cls, tar: Any) -> "Header":
        at = tar.fileobj.tell()
        try:
            if at >= tar.end:
                raise tarfile.EmptyHeaderError  # type: ignore[attr-defined]
            header = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.zeros += 1
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            if tar.zeros < 2 and at > 0:
                raise tarfile.ReadError(f"it ends at byte {at} without a tar's end: it is cut short") from None
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no tar header at byte {at}: {error}") from None
        except (ValueError, ArithmeticError, LookupError, RecursionError) as error:  # tarfile lets them through
            raise tarfile.ReadError(f"no tar header at byte {at}: {str(error) or type(error).__name__}") from None
        if not 0 <= header.size < 1 << 62:  # PAX has another behind the header
            raise tarfile.ReadError(f"no tar header at byte {at}: a size of {header.size}")
        if tar.zeros == 1:
            raise tarfile.ReadError(f"no tar header at byte {at - tarfile.BLOCKSIZE}: zeros")
        tar.zeros = 0
        return header


LONGEST = 1 << 20  # bytes of what is no file: a name, or what PAX says of one


class Archive(tarfile.TarFile):
    """end: where it ends in its file, as one inside another does."""

    tarinfo = Header
    ignore_zeros = True
    zeros = 0  # blocks, since the last member

    def __init__(self, *args: Any, end: float = math.inf, **options: Any):
        self.end = end
        super().__init__(*args, **options)

    def move(self, at: int) -> None:
        """Goes on with the header at byte `at`."""
        self.fileobj.seek(at)
        self.firstmember, self.offset, self.zeros = None, at, 0

    def next(self) -> tarfile.TarInfo | None:
        member = super().next()
        if member and self.offset > self.end:
            raise tarfile.ReadError(f"{member.name} is cut short")
        return member


def is_file(member: tarfile.TarInfo) -> bool:
    """Raises ReadError for a link: tar stores a file with two names once, and a link to it; and for a sparse file."""
    if member.islnk() or member.issym() or member.issparse():
        raise tarfile.ReadError(f"{member.name} is a {'sparse file' if member.issparse() else 'link and no file'}")
    return member.isfile()


def content(tar: Archive, member: tarfile.TarInfo, most: int) -> bytes:
    """Returns what a file in a tar holds. Raises ReadError for one of more bytes: a compressed tar may say anything."""
    if not is_file(member) or member.size > most:
        raise tarfile.ReadError(f"{member.name} is no file of at most {most} bytes")
    file = tar.extractfile(member)
    assert file
    return file.read()


@contextmanager
def opened(
    path: Path | str, what: str, again: str, *, at: int = 0, end: float = math.inf, compressed: bool = False
) -> Iterator[Archive]:
    """Yields the tar at the bytes `at` to `end` of a file, of which only headers are read.

    Raises InputError, of `what`, the reason and `again`, for what is not a tar to its end.
    """
    try:
        with open(to_read(Path(path)), "rb", buffering=0) as file:
            end = end if compressed else min(end, os.fstat(file.fileno()).st_size)
            file.seek(at)
            with Archive.open(fileobj=file, mode="r" if compressed else "r:", end=end) as tar:  # type: ignore[call-overload]
                yield tar
    except (OSError, EOFError, tarfile.TarError, zlib.error, LZMAError) as error:
        why = getattr(error, "strerror", None) or str(error).partition(":\n")[0]
        raise InputError(f"{what}: cannot be read ({why}): {again}") from None
