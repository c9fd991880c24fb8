"""Outputs that appear whole, by one rename, or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from promprune.errors import OutputError

__all__ = ["replace_file", "writing_folder"]

# The operating system's ways of saying that writing, rather than anything else, went wrong.
_WRITE_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
_CAN_ASK: Final = os.name != "nt"  # on Windows, signal 0 is Ctrl-C
_TAKEN: Final = frozenset({errno.ENOTEMPTY, errno.EEXIST})


@contextmanager
def writing_folder(output: Path, *, replace: bool, fix: str) -> Iterator[Path]:
    """Yield an empty folder beside ``output`` that becomes ``output`` by one rename when the block succeeds.

    When the block fails, or the process is killed, ``output`` is as it was. What a killed process left behind
    (``.NAME.partial-PID-*``) is removed by the next one that writes the same folder, but on Windows. Of two processes
    that replace the same folder the later one stays, whole.

    Args:
        output: the folder.
        replace: take the place of a folder that is there; otherwise that is refused.
        fix: what to do where it cannot be written, in words.

    Raises:
        OutputError: it cannot be written, or is there already and ``replace`` is off.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_partials_of_dead_processes(output)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-{os.getpid()}-", dir=output.parent))
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
    """Rename ``partial`` to ``output``; retried, because another process may do the same at the same moment."""
    old = partial.with_name(f"{partial.name}.old")
    try:
        while True:
            try:
                partial.rename(output)
                return
            except OSError as error:
                # Taken by a folder that is there, or was a moment ago: others may have moved it away since.
                if error.errno not in _TAKEN and not (error.errno == errno.EACCES and output.is_dir()):
                    raise
            shutil.rmtree(old, ignore_errors=True)
            try:
                output.rename(old)
            except FileNotFoundError:
                continue
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _unwritable(output: Path, error: OSError, fix: str) -> OutputError:
    return OutputError(f"{output} cannot be written ({error.strerror})", fix=fix)


def _remove_partials_of_dead_processes(output: Path) -> None:
    pattern = re.compile(re.escape(f".{output.name}.partial-") + r"(\d+)-")
    for path in output.parent.iterdir():
        match = pattern.match(path.name)
        if match and not _is_alive(int(match[1])):
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
