"""Outputs that appear whole, by one rename, or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from promprune.errors import OutputError

__all__ = ["replace_file", "writing_folder"]

# The operating system's ways of saying that writing, rather than anything else, went wrong.
_WRITE_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
_CAN_ASK: Final = os.name != "nt"  # on Windows, signal 0 is Ctrl-C
_TAKEN: Final = frozenset({errno.ENOTEMPTY, errno.EEXIST})
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux's numbers

# Process numbers say nothing about other machines that share the folder.
_HOST: Final = re.sub(r"\W", "_", platform.node(), flags=re.ASCII)


@contextmanager
def writing_folder(output: Path, *, replace: bool, fix: str) -> Iterator[Path]:
    """Yield an empty folder beside ``output`` that becomes ``output`` by one rename when the block succeeds.

    When the block fails, or the process is killed, ``output`` is as it was. What a killed process left beside it
    (``.NAME.partial-HOST-PID-*``) is removed by the next one of this machine that writes the same folder, but on
    Windows. Of two processes that replace the same folder the later one stays, whole.

    Linux lets the old folder and the new one change places at once, on most file systems. Elsewhere the old one is
    away (``.NAME.old-HOST-PID-*``) for a moment; if the process is killed right then, the next one puts it back.

    Args:
        output: the folder.
        replace: take the place of a folder that is there; otherwise that is refused.
        fix: what to do where it cannot be written, in words.

    Raises:
        OutputError: it cannot be written, or is there already and ``replace`` is off.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _clean_up_after_dead_processes(output)
        if not replace and output.exists():
            raise OutputError(f"{output} already exists", expected="a new folder", fix=fix)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-{_HOST}-{os.getpid()}-", dir=output.parent))
    except OSError as error:
        raise _unwritable(output, error, fix) from error
    try:
        yield partial
        _move_into_place(partial, output, replace=replace, fix=fix)
    except OSError as error:
        if error.errno not in _WRITE_ERRORS:
            raise
        raise _unwritable(output, error, fix) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)


def _move_into_place(partial: Path, output: Path, *, replace: bool, fix: str) -> None:
    try:
        partial.chmod(0o755)
        if replace:
            _swap(partial, output)
        else:
            partial.rename(output)
    except OSError as error:
        if not replace and error.errno in _TAKEN:
            raise OutputError(
                f"{output} was written by another process meanwhile", expected="a new folder", fix=fix
            ) from error
        raise _unwritable(output, error, fix) from error


def _swap(partial: Path, output: Path) -> None:
    """Rename ``partial`` to ``output``, whatever folder is there; that one is put back if it fails.

    Retried, because another process may do the same at the same moment.
    """
    old = _sibling(partial, output, "old")
    while not (_exchange(partial, output) or _renamed(partial, output)):
        try:
            output.rename(old)
            if _renamed(partial, output):
                return
        except FileNotFoundError:  # others have moved it away since
            continue
        finally:
            _settle(old, output)


def _exchange(partial: Path, output: Path) -> bool:
    """Let two folders change places at once; return whether they did: the system, or the disk, may not know how."""
    if sys.platform != "linux" or output.is_symlink() or not output.is_dir():
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    places = _AT_FDCWD, os.fsencode(partial), _AT_FDCWD, os.fsencode(output)
    return renameat2 is not None and renameat2(*places, _RENAME_EXCHANGE) == 0


def _renamed(partial: Path, output: Path) -> bool:
    """Rename, and return whether that was done; it is not where a folder has that name, or had it a moment ago."""
    try:
        partial.rename(output)
    except OSError as error:
        if error.errno not in _TAKEN and not (error.errno == errno.EACCES and output.is_dir()):
            raise
        return False
    return True


def _settle(old: Path, output: Path) -> None:
    """Put a folder that was moved away back, or remove it where something else took its place."""
    with suppress(OSError):  # it was not moved away, or cannot be moved now: the next process tries again
        if output.exists() or not _renamed(old, output):
            unwanted = _sibling(old, output, "gone")  # nobody puts that back, should only a part of it be removed
            old.rename(unwanted)
            shutil.rmtree(unwanted)


def _sibling(path: Path, output: Path, kind: str) -> Path:
    """Return the name for another kind of folder beside ``output``, of the same process."""
    owner = path.name.removeprefix(f".{output.name}.").partition("-")[2]
    return path.with_name(f".{output.name}.{kind}-{owner}")


def _unwritable(output: Path, error: OSError, fix: str) -> OutputError:
    return OutputError(f"{output} cannot be written ({error.strerror})", fix=fix)


def _clean_up_after_dead_processes(output: Path) -> None:
    """Put back what processes of this machine moved away and were killed over, and remove what else they left."""
    pattern = re.compile(re.escape(f".{output.name}.") + f"(partial|old|gone)-{re.escape(_HOST)}-" + r"(\d+)-")
    for path in list(output.parent.iterdir()):
        match = pattern.match(path.name)
        if match is None or _is_alive(int(match[2])):
            continue
        if match[1] == "old":
            _settle(path, output)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    """Say whether a process may still run."""
    if not _CAN_ASK:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
