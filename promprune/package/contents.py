"""The files of a package: regular files inside its folder, of limited size, and the reading of its JSON records.

A link is followed only if it leads to a file inside the package, or if the package is a snapshot in a hub cache
(``.../snapshots/REVISION``) and the link leads to one of the cache's blobs (``.../blobs/DIGEST``). Weights that
``--link-weights`` links from a checkpoint are reflinks or hard links, which are regular files.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from promprune.errors import ConfigError, PackageError
from promprune.inputs import read_file

__all__ = ["MAX_CONFIG_BYTES", "MAX_RECORD_BYTES", "check_contents", "is_inside", "read_content", "read_record"]

MAX_RECORD_BYTES: Final = 16 * 1024 * 1024  # of a manifest
MAX_CONFIG_BYTES: Final = 4 * 1024 * 1024  # of a JSON file of transformers
_MAX_ENTRIES: Final = 20_000
_BLOB: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_DO_NOT_USE: Final = "do not use this package; export it again"

T = TypeVar("T")


def check_contents(folder: Path) -> None:
    """Refuse a package that contains anything but folders, regular files, and links as above.

    Raises:
        PackageError: it contains something else, or too many files, or cannot be read.
    """
    pending, entries = [folder], 0
    while pending:
        try:
            with os.scandir(pending.pop()) as found:
                for entry in found:
                    entries += 1
                    if entries > _MAX_ENTRIES:
                        raise PackageError(f"{folder} has more than {_MAX_ENTRIES} files", fix=_DO_NOT_USE)
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
                    else:
                        _check_entry(folder, Path(entry.path))
        except OSError as error:
            raise PackageError(f"{error.filename or folder} cannot be read ({error.strerror})") from error


def _check_entry(folder: Path, path: Path) -> None:
    name = path.relative_to(folder)
    if path.is_symlink() and not is_inside(folder, path):
        raise PackageError(
            f"{name} in {folder} is a link that leads out of it", expected="a file inside the package", fix=_DO_NOT_USE
        )
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise PackageError(f"{name} in {folder} is not a regular file", expected="files and folders", fix=_DO_NOT_USE)


def is_inside(folder: Path, path: Path) -> bool:
    """Return whether a path of a package leads to a file inside it, or to a blob of the hub cache that it is in."""
    try:
        target, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # a link to itself; the error depends on Python's version
        return False
    if target.is_relative_to(root):
        return True
    blobs = root.parent.parent / "blobs"
    return root.parent.name == "snapshots" and target.parent == blobs and _BLOB.fullmatch(target.name) is not None


def read_content(path: Path, *, most_bytes: int, fix: str) -> bytes:
    """Return the content of one file of a package.

    Raises:
        PackageError: it is missing, not a regular file, or larger than ``most_bytes``.
    """
    try:
        return read_file(path, most_bytes=most_bytes)
    except OSError as error:
        raise PackageError(f"{path} cannot be read ({error.strerror})", fix=fix) from error


def read_record(
    path: Path,
    kind: type[T],
    *,
    version: int,
    fix: str,
    what: str,
    key: str = "schema_version",
    upgrade: Callable[[int, bytes], str] | None = None,
) -> T:
    """Read a JSON file that begins with the version of its schema.

    Args:
        path: the file.
        kind: type of its content.
        version: the version that is supported; of another one, only this number is read.
        fix: what to do if the file is not valid.
        what: description of the file for messages, such as ``"manifest"``.
        key: name of the version in the file.
        upgrade: returns what to do about another version, given it and the content; ``fix`` if None.

    Raises:
        OSError: it cannot be read, or has more than ``MAX_RECORD_BYTES``.
        PackageError: it is not valid, or has another version.
    """
    content = read_file(path, most_bytes=MAX_RECORD_BYTES)
    try:
        found = _version_of(content, key)
        if found == version:
            return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ConfigError) as error:
        raise PackageError(f"{path} is not a valid {what} ({error})", fix=fix) from error
    raise PackageError(
        f"{path} has {key.replace('_', ' ')} {found}",
        expected=f"version {version}",
        fix=upgrade(found, content) if upgrade else fix,
    )


def _version_of(content: bytes, key: str) -> int:
    kind = msgspec.defstruct("Versioned", [(key, int)])
    version: int = getattr(msgspec.json.decode(content, type=kind), key)
    return version
