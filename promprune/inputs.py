"""Reading files that may be anything: regular files only, and never more bytes than expected."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Final

__all__ = ["open_file", "read_file"]

# Opening a named pipe would otherwise wait for somebody who writes to it.
_FLAGS: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def open_file(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened, or it is a folder, a named pipe or a device.
    """
    handle = os.open(path, _FLAGS)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_file(path: Path, *, most_bytes: int) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: as :func:`open_file`; or it has more than ``most_bytes``.
    """
    with open_file(path) as stream:
        size_bytes = os.fstat(stream.fileno()).st_size
        if size_bytes > most_bytes:
            raise OSError(errno.EFBIG, f"{size_bytes} bytes, more than {most_bytes}", str(path))
        return stream.read(size_bytes)
