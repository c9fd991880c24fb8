"""External data of a package's graphs: weights in files that are linked from the checkpoint, or in new files.

A linked file is a reflink if the file system supports it, else a hard link: it needs no disk space, belongs to the
package, and remains if the checkpoint is deleted. ONNX Runtime and TensorRT refuse weights outside the model's folder,
by path or through a symbolic link, so neither is an option.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import onnx_ir as ir

from promprune.errors import OutputError
from promprune.export.checkpoint.weights import CheckpointTensor, LazyWeight

__all__ = ["LINK_MIN_BYTES", "ExternalData", "link_weights"]

LINK_MIN_BYTES: Final = 256 * 1024 * 1024  # smaller checkpoints are copied unless a link is requested
# Smaller initializers stay inside the .onnx file: they are shapes and constants that a graph optimizer reads.
EXTERNAL_DATA_MIN_BYTES: Final = 1024
ALIGNMENT: Final = 4096  # so that a tensor can be mapped into memory

_FICLONE: Final = 0x40049409  # ioctl of Linux: share the blocks of another file until one of the two is written


class _Location(NamedTuple):
    file: str
    offset: int


@dataclass(kw_only=True)
class ExternalData:
    """Moves the weights of the graphs in one folder into files beside them.

    Attributes:
        folder: the folder of the graphs.
        links: file of the checkpoint -> its name in ``folder``; some links may be unused.
        must_link: fail if a tensor of a linked checkpoint has to be converted.
        digests: file of weights -> its SHA-256.
    """

    folder: Path
    links: dict[Path, str]
    must_link: bool = False
    digests: dict[Path, str] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)
    _shared: dict[Hashable, _Location] = field(default_factory=dict)

    @classmethod
    def create(cls, folder: Path, checkpoint: Mapping[Path, str], *, copy: bool | None) -> Self:
        """Create the folder, and link the files of a checkpoint into it (see :func:`link_weights`).

        Args:
            folder: the folder to create.
            checkpoint: file of weights of the checkpoint -> its SHA-256.
            copy: see :func:`link_weights`.

        Raises:
            OutputError: ``copy`` is ``False`` and a link cannot be made.
        """
        folder.mkdir()
        links = link_weights(tuple(checkpoint), folder, copy=copy)
        digests = {folder / name: checkpoint[file] for file, name in links.items()}
        return cls(folder=folder, links=links, must_link=copy is False, digests=digests)

    def move(self, model: ir.Model, name: str, *, share: bool = False) -> tuple[str, ...]:
        """Move a graph's weights out of it: into the file ``name``, unless they are in a linked file.

        Args:
            model: the graph.
            name: name of the new file of weights.
            share: reuse weights from the files of earlier graphs that were also moved with ``share``.

        Returns:
            The names of the files that now hold the weights.

        Raises:
            OutputError: ``must_link`` is set, and a tensor would have to be converted.
        """
        files = []
        with _HashedFile(self.folder / name) as own:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < EXTERNAL_DATA_MIN_BYTES:
                    continue
                file, offset = self._known_location(tensor, share) or _Location(name, own.append(tensor))
                if share and isinstance(tensor, LazyWeight):
                    self._shared[tensor.identity] = _Location(file, offset)
                files.append(file)
                value.const_value = self._external_tensor(tensor, str(value.name), file, offset)
        if name in files:
            self.digests[self.folder / name] = own.digest
        else:
            (self.folder / name).unlink()
        self._used.update(files)
        return tuple(sorted(set(files)))

    def _external_tensor(self, tensor: ir.TensorProtocol, name: str, file: str, offset: int) -> ir.ExternalTensor:
        shape = ir.Shape(tensor.shape.numpy())
        return ir.ExternalTensor(
            file, offset, tensor.nbytes, tensor.dtype, shape=shape, name=name, base_dir=self.folder
        )

    def remove_unused(self) -> None:
        """Remove the links that no graph reads from."""
        for name in set(self.links.values()) - self._used:
            (self.folder / name).unlink()

    def _known_location(self, tensor: ir.TensorProtocol, share: bool) -> _Location | None:
        """Return the file and offset at which a tensor is already stored; None if it has to be written."""
        if isinstance(tensor, CheckpointTensor) and (location := self._linked_location(tensor)):
            return location
        return self._shared.get(tensor.identity) if share and isinstance(tensor, LazyWeight) else None

    def _linked_location(self, tensor: CheckpointTensor) -> _Location | None:
        stored = tensor.stored
        if tensor.is_as_stored and stored.file in self.links:
            return _Location(self.links[stored.file], stored.offset)
        if self.must_link:
            raise OutputError(
                f"{stored.key} in {stored.file.name} cannot be linked: it is stored as {stored.dtype}",
                expected=f"weights in {tensor.torch_dtype} (set by --dtype), aligned to their element size",
                fix="choose the checkpoint's own --dtype, or omit --link-weights",
            )
        return None


def link_weights(files: Sequence[Path], folder: Path, *, copy: bool | None) -> dict[Path, str]:
    """Link the files of a checkpoint into a folder.

    Args:
        files: files of the checkpoint; symbolic links, such as those of a hub cache, are followed.
        folder: the folder of the graphs.
        copy: True to link nothing; False to link, or fail; None to link a checkpoint of at least
            ``LINK_MIN_BYTES`` if the file system allows it.

    Returns:
        file -> its name in ``folder``; empty if the weights are to be copied.

    Raises:
        OutputError: ``copy`` is ``False`` and a link cannot be made.
    """
    if copy or (copy is None and sum(file.stat().st_size for file in files) < LINK_MIN_BYTES):
        return {}
    links = {}
    try:
        for file in files:
            _link(file.resolve(), folder / file.name)
            links[file] = file.name
    except OSError as error:
        if copy is False:
            raise OutputError(
                f"{file} cannot be linked into {folder.parent} ({error.strerror})",
                expected="an output folder on the file system of the checkpoint",
                fix="choose another -o, or --copy-weights",
            ) from error
        for name in links.values():
            (folder / name).unlink()
        return {}
    return links


def _link(source: Path, target: Path) -> None:
    try:
        _reflink(source, target)
    except OSError:
        target.unlink(missing_ok=True)
        os.link(source, target)


def _reflink(source: Path, target: Path) -> None:
    if sys.platform != "linux":
        raise OSError("reflinks are not supported on this system")
    import fcntl

    with source.open("rb") as read, target.open("wb") as write:
        fcntl.ioctl(write.fileno(), _FICLONE, read.fileno())


class _HashedFile:
    """A file of tensors that is hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def append(self, tensor: ir.TensorProtocol) -> int:
        """Write a tensor and return its offset."""
        self.write(bytes(-self._stream.tell() % ALIGNMENT))
        offset = self._stream.tell()
        if isinstance(tensor, CheckpointTensor):
            tensor.tofile(self)
        else:
            self.write(tensor.tobytes())
        return offset

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._stream.write(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stream.close()
