"""Atomic outputs: a file or folder appears complete, by one rename, or not at all."""

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

# The error numbers by which the operating system reports that writing failed.
_WRITE_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
_CAN_ASK: Final = os.name != "nt"  # on Windows, signal 0 is Ctrl-C
_TAKEN: Final = frozenset({errno.ENOTEMPTY, errno.EEXIST})
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux's numbers

# Part of the names: a process number is meaningful on its own machine only, and machines may share the folder.
_HOST: Final = re.sub(r"\W", "_", platform.node(), flags=re.ASCII)


@contextmanager
def writing_folder(output: Path, *, replace: bool, fix: str) -> Iterator[Path]:
    """Yield an empty folder beside ``output`` that becomes ``output`` by one rename when the block succeeds.

    If the block fails, or the process is killed, ``output`` is unchanged. What a killed process left beside it
    (``.NAME.partial-HOST-PID-*``) is removed by the next process on this machine that writes the same folder (not on
    Windows). If two processes replace the same folder, the complete output of the later one remains.

    On Linux, most file systems exchange the old and the new folder atomically. Elsewhere the old one is missing for a
    moment (it is then named ``.NAME.old-HOST-PID-*``); if the process is killed just then, the next one restores it.

    Args:
        output: the folder.
        replace: replace an existing folder; if false, an existing folder is refused.
        fix: what the error message suggests if the folder cannot be written.

    Raises:
        OutputError: the folder cannot be written, or it exists and ``replace`` is false.
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
        OSError: the file cannot be written; the old one is unchanged.
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
    """Rename ``partial`` to ``output`` and remove the old ``output``, which is restored if the renaming fails.

    Retried, because another process may do the same at the same moment.
    """
    old = _sibling(partial, output, "old")
    while not (_exchange(partial, output) or _try_rename(partial, output)):
        try:
            output.rename(old)
            if _try_rename(partial, output):
                return
        except FileNotFoundError:  # another process has moved it away meanwhile
            continue
        finally:
            _settle(old, output)


def _exchange(partial: Path, output: Path) -> bool:
    """Exchange two folders atomically; return False if the operating system or the file system cannot."""
    if sys.platform != "linux" or output.is_symlink() or not output.is_dir():
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    places = _AT_FDCWD, os.fsencode(partial), _AT_FDCWD, os.fsencode(output)
    return renameat2 is not None and renameat2(*places, _RENAME_EXCHANGE) == 0


def _try_rename(partial: Path, output: Path) -> bool:
    """Rename a folder; return False if a folder of that name exists, or existed a moment ago."""
    try:
        partial.rename(output)
    except OSError as error:
        if error.errno not in _TAKEN and not (error.errno == errno.EACCES and output.is_dir()):
            raise
        return False
    return True


def _settle(old: Path, output: Path) -> None:
    """Restore a folder that was moved away, or remove it if another one has replaced it."""
    with suppress(OSError):  # it was not moved away, or cannot be moved now: the next process tries again
        if output.exists() or not _try_rename(old, output):
            unwanted = _sibling(old, output, "gone")  # never restored, even if only a part of it could be removed
            old.rename(unwanted)
            shutil.rmtree(unwanted)


def _sibling(path: Path, output: Path, kind: str) -> Path:
    """Return the name for another kind of folder beside ``output``, of the same process."""
    owner = path.name.removeprefix(f".{output.name}.").partition("-")[2]
    return path.with_name(f".{output.name}.{kind}-{owner}")


def _unwritable(output: Path, error: OSError, fix: str) -> OutputError:
    return OutputError(f"{output} cannot be written ({error.strerror})", fix=fix)


def _clean_up_after_dead_processes(output: Path) -> None:
    """Restore the folders that killed processes of this machine had moved away, and remove what else they left."""
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
    """Return whether a process may still be running."""
    if not _CAN_ASK:
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
