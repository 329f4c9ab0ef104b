"""Files that are read."""

import os
import stat
from pathlib import Path

from nvcnn.program import InputError


def to_read(path: Path) -> Path:
    """Returns the path. Raises InputError for a named pipe, a socket or a device, which would keep a reader waiting.

    A file that is missing or may not be read is for the reader to say.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return path
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return path
    kind = "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    raise InputError(f"{path}: is {kind}, not a file: remove it, or give another path")
