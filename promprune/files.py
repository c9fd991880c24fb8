"""Outputs: paths are checked before anything is computed; files and folders appear complete, by one rename."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from promprune.errors import OutputError

__all__ = ["check_output_file", "check_output_folder", "output_errors", "replace_file", "writing_folder"]

# The error numbers by which the operating system reports that writing failed.
_WRITE_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_CAN_ASK: Final = os.name != "nt"  # on Windows, signal 0 is Ctrl-C
_TAKEN: Final = frozenset({errno.ENOTEMPTY, errno.EEXIST})
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux's numbers

# Part of the names: a process number is meaningful on its own machine only, and machines may share the folder.
_HOST: Final = re.sub(r"\W", "_", platform.node(), flags=re.ASCII)[:64]
_MAX_NAME_BYTES: Final = 100  # of a name that is part of a longer one; file systems allow 255
_ABANDONED_S: Final = 24 * 60 * 60  # after so long without a change, what another machine left is removed


def check_output_file(path: Path, option: str, *, suffixes: Sequence[str] = (), new_folder: Path | None = None) -> None:
    """Refuse a file that cannot be written.

    Args:
        path: the file; it may exist.
        option: the command's option that named it.
        suffixes: what its name may end in, in lower case; empty: anything.
        new_folder: folder that the command makes if it does not exist.

    Raises:
        OutputError: the name ends in something else, or it is a folder, or its folder does not exist.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        raise OutputError(f"received {option} {path}", expected=f"a name that ends in {', '.join(suffixes)}")
    if path.is_dir():
        found = "which is a folder"
    elif not path.parent.is_dir() and path.parent != new_folder:
        found = f"but {path.parent} is not a folder"
    else:
        return
    raise OutputError(
        f"received {option} {path}, {found}", expected="a file in an existing folder", fix=f"choose another {option}"
    )


def check_output_folder(
    output: Path, option: str, *, marker: str = "", contents: str = "", force: bool = False, whole: bool = False
) -> None:
    """Refuse a folder that cannot be written, or in which files would be overwritten unasked.

    Args:
        output: the folder; files are written to it, or the entire folder is replaced.
        option: the command's option for it.
        marker: name of the file by which earlier results are recognised.
        contents: description of such results for the message, such as ``"a report"``.
        force: replace earlier results, and nothing else.
        whole: replace the entire folder; if false, other files in it remain.

    Raises:
        OutputError: the folder cannot be written; or it contains results and ``force`` is false; or it is to be
            replaced and contains something else.
    """
    there = next((path for path in (output, *output.parents) if path.exists()), Path())
    fix = f"choose another {option}"
    if there == output and whole:
        _check_replaced(output, marker=marker, contents=contents, force=force, fix=fix)
        return
    if not there.is_dir():
        raise OutputError(f"received {option} {output}, but {there} is not a folder", expected="a folder", fix=fix)
    if marker and not force and (output / marker).exists():
        raise OutputError(f"{output} holds {contents} already", expected="a new folder", fix=f"{fix}, or add --force")
    with output_errors(output, fix=fix), tempfile.TemporaryFile(dir=there) as scratch:
        scratch.write(b"promprune")


def _check_replaced(output: Path, *, marker: str, contents: str, force: bool, fix: str) -> None:
    """Refuse to replace a folder unless ``force`` is given and the folder contains earlier results or is empty."""
    if not force:
        raise OutputError(
            f"{output} already exists", expected="a new folder", fix=f"{fix}, or add --force to replace it"
        )
    try:  # another process may be replacing it, and has moved it away
        names = [path.name for path in output.iterdir()] if not output.is_symlink() else None
    except FileNotFoundError:
        return
    except NotADirectoryError:
        names = None
    if names is None or (names and marker not in names):
        raise OutputError(
            f"{output} exists and is not {contents}, so --force does not replace it",
            fix=f"{fix}, or remove it yourself",
        )


@contextmanager
def output_errors(output: Path, *, fix: str) -> Iterator[None]:
    """Turn an error of the operating system into an :class:`OutputError` that names the output."""
    try:
        yield
    except OSError as error:
        raise _unwritable(output, error, fix) from error


@contextmanager
def writing_folder(output: Path, *, replace: bool, fix: str) -> Iterator[Path]:
    """Yield an empty folder beside ``output`` that becomes ``output`` by one rename when the block succeeds.

    If the block fails, or the process is killed, ``output`` is unchanged. What a killed process left beside it
    (``.NAME.partial-HOST-PID-*``) is removed by the next process that writes the same folder: on the same machine at
    once (not on Windows), elsewhere when nothing in it has changed for a day. If two processes replace the same
    folder, the complete output of the later one remains.

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
        partial = Path(tempfile.mkdtemp(prefix=f".{_short(output)}.partial-{_HOST}-{os.getpid()}-", dir=output.parent))
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
    prefix = f".{_short(path)}.partial-"
    for left in path.parent.glob(f"{glob.escape(prefix)}*"):
        if left.is_file() and _is_abandoned(left):
            left.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(prefix=prefix, dir=path.parent)
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
    owner = path.name.removeprefix(f".{_short(output)}.").partition("-")[2]
    return path.with_name(f".{_short(output)}.{kind}-{owner}")


def _short(output: Path) -> str:
    """Return the name of an output; if it is long, its beginning and a digest, so that more can be added to it."""
    name = os.fsencode(output.name)
    if len(name) <= _MAX_NAME_BYTES:
        return output.name
    return f"{output.name[: _MAX_NAME_BYTES // 8]}-{hashlib.sha256(name).hexdigest()[:16]}"


def _unwritable(output: Path, error: OSError, fix: str) -> OutputError:
    if error.errno in _FULL:
        fix = "free space there, or choose another place"
    return OutputError(f"{output} cannot be written ({error.strerror or error})", fix=fix)


def _clean_up_after_dead_processes(output: Path) -> None:
    """Restore the folders that killed processes had moved away, and remove what else they left."""
    pattern = re.compile(re.escape(f".{_short(output)}.") + r"(partial|old|gone)-(\w*)-(\d+)-")
    for path in list(output.parent.iterdir()):
        match = pattern.match(path.name)
        if match is None or not ((match[2] == _HOST and not _is_alive(int(match[3]))) or _is_abandoned(path)):
            continue
        if match[1] == "old":
            _settle(path, output)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: Path) -> bool:
    """Return whether nothing in a file or folder has changed for a day."""
    try:
        newest = max(inside.lstat().st_mtime for inside in (path, *path.rglob("*")))
    except OSError:  # it is being changed
        return False
    return time.time() - newest > _ABANDONED_S


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
