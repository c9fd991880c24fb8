"""The weights of a checkpoint on disk, and the links from a model's parameters to them.

Only the headers of the safetensors files are read at first; the data of a tensor is read when it is used.
"""

from __future__ import annotations

import json
import math
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn

from promprune.dtypes import BY_NAME, BY_NUMPY, BY_SAFETENSORS
from promprune.errors import ModelError, UnsupportedModelError

__all__ = [
    "CheckpointTensor",
    "LazyWeight",
    "LinkedWeight",
    "StoredTensor",
    "initializer",
    "link",
    "linked",
    "read_linked",
    "stored_tensors",
    "tensor_at",
    "torch_dtype",
    "weight_files",
]

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
ADAPTER_FILE: Final = "adapter_model.safetensors"
CHUNK_ELEMENTS: Final = 4 * 1024 * 1024  # elements that are read, converted and written at a time

_MAX_HEADER_BYTES: Final = 100_000_000  # limit of the safetensors format
_MAX_INDEX_BYTES: Final = 100_000_000
_FLOATS: Final = ("F64", "F32", "F16", "BF16")
_EXPECTED: Final = "a complete checkpoint in safetensors format"


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of an element type of this project, such as ``"fp16"``."""
    dtype: torch.dtype = getattr(torch, BY_NAME[name].numpy)
    return dtype


class Writable(Protocol):
    """The target of :meth:`StoredTensor.write`: a file, or a file that is hashed while it is written."""

    def write(self, data: memoryview, /) -> object:
        """Append bytes."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        key: its name in the checkpoint.
        file: the safetensors file that holds it.
        dtype: its name in safetensors: ``"F32"``, ``"F16"``, ``"BF16"``, ...
        shape: its shape.
        offset: offset of its first byte in the file.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype it is stored in.

        Raises:
            UnsupportedModelError: it is not a floating-point dtype: the checkpoint is quantized.
        """
        if self.dtype not in _FLOATS:
            raise UnsupportedModelError(
                f"{self.key} in {self.file.name} is stored as {self.dtype}",
                expected=f"one of {', '.join(_FLOATS)}: quantized checkpoints are not exported",
            )
        return torch_dtype(BY_SAFETENSORS[self.dtype].name)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype it is stored in, as numpy's; integers too."""
        return np.dtype(BY_SAFETENSORS[self.dtype].numpy)

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    def chunks(self, count: int | None = None) -> Iterator[Tensor]:
        """Yield its elements in order, flat, in the stored dtype, ``count`` at a time.

        The chunks share one buffer: a chunk is valid until the next one is yielded.

        Args:
            count: elements per chunk; None for ``CHUNK_ELEMENTS``.

        Raises:
            ModelError: the file became shorter.
        """
        count = count or CHUNK_ELEMENTS
        buffer = torch.empty(min(count, self.size), dtype=self.torch_dtype)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset)
            for begin in range(0, self.size, count):
                values = buffer[: min(count, self.size - begin)]
                _fill(stream, values.view(torch.uint8).numpy().data, self)
                yield values

    def read(self, dtype: torch.dtype) -> Tensor:
        """Read the entire tensor, converted to ``dtype``.

        Raises:
            ModelError: it has finite values that ``dtype`` cannot hold, or the file became shorter.
        """
        whole = torch.empty(self.size, dtype=dtype)
        begin = 0
        for chunk in self.chunks():
            part = whole[begin : begin + len(chunk)].copy_(chunk)
            self._refuse_overflow(chunk, part)
            begin += len(chunk)
        return whole.view(self.shape)

    def write(self, stream: Writable, dtype: torch.dtype) -> None:
        """Append its elements to a file, converted to ``dtype``.

        Raises:
            ModelError: it has finite values that ``dtype`` cannot hold, or the file became shorter.
        """
        for chunk in self.chunks():
            converted = chunk.to(dtype)
            self._refuse_overflow(chunk, converted)
            stream.write(converted.view(torch.uint8).numpy().data)

    def _refuse_overflow(self, values: Tensor, converted: Tensor) -> None:
        if torch.finfo(converted.dtype).max >= torch.finfo(values.dtype).max:
            return
        if bool((values.isfinite() & ~converted.isfinite()).any()):
            raise ModelError(
                f"{self.key} has values up to {float(values.abs().max()):.3g}, which {converted.dtype} cannot hold",
                expected=f"at most {torch.finfo(converted.dtype).max:.3g}",
                fix="export with --dtype bf16 or fp32",
            )


class LazyWeight(ir.LazyTensor, ABC):
    """The value of a graph's initializer that is computed from a checkpoint when it is used."""

    @property
    @abstractmethod
    def identity(self) -> Hashable:
        """A key that equal tensors share; of tensors with one key only the first is written."""


class CheckpointTensor(LazyWeight):
    """A tensor of a checkpoint as the value of a graph's initializer; read and converted when it is used.

    Attributes:
        stored: the checkpoint's tensor.
        torch_dtype: dtype of the initializer.
    """

    def __init__(self, stored: StoredTensor, dtype: torch.dtype, name: str) -> None:
        element = BY_NUMPY[str(dtype).removeprefix("torch.")]
        super().__init__(self._load, ir.DataType(element.onnx), ir.Shape(stored.shape), name=name)
        self.stored = stored
        self.torch_dtype = dtype

    @property
    def identity(self) -> Hashable:
        """The stored tensor and the dtype it is converted to."""
        return (self.stored, self.torch_dtype)

    @property
    def is_as_stored(self) -> bool:
        """Whether the checkpoint's bytes can be used unchanged: same dtype, aligned."""
        stored = self.stored.torch_dtype
        return stored == self.torch_dtype and self.stored.offset % stored.itemsize == 0

    def tofile(self, file: Writable) -> None:
        """Append the tensor to a file, in chunks."""
        self.stored.write(file, self.torch_dtype)

    def _load(self) -> ir.TensorProtocol:
        values = self.stored.read(self.torch_dtype).view(torch.uint8).numpy()
        return ir.Tensor(values.view(self.dtype.numpy()).reshape(self.stored.shape), dtype=self.dtype, name=self.name)


@dataclass(frozen=True)
class LinkedWeight:
    """The place of a parameter's value in a checkpoint.

    Attributes:
        name: name of the parameter in the transformers model; the graphs' initializers have the same name.
        stored: the checkpoint's tensor.
    """

    name: str
    stored: StoredTensor


def link(parameter: nn.Parameter, weight: LinkedWeight) -> None:
    """Record that the value of a parameter without data is stored in a checkpoint."""
    parameter.promprune_weight = weight  # type: ignore[attr-defined]


def linked(parameter: Tensor) -> LinkedWeight | None:
    """Return the place of a parameter's value in a checkpoint; None if the parameter has its value in memory."""
    return getattr(parameter, "promprune_weight", None)


def read_linked(parameter: Tensor) -> Tensor:
    """Read the value of a linked parameter from its checkpoint, in fp32.

    Raises:
        ModelError: the file became shorter.
    """
    weight = linked(parameter)
    if weight is None:
        raise RuntimeError("the parameter is not linked to a checkpoint")
    return weight.stored.read(torch.float32)


def tensor_at(module: nn.Module, path: str) -> Tensor | None:
    """Return the parameter or buffer at a path; None if there is none."""
    owner, _, name = path.rpartition(".")
    try:
        found = getattr(module.get_submodule(owner), name, None)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def initializer(tensor: Tensor, name: str) -> ir.Value:
    """Return a graph's initializer for a parameter or buffer; a linked one keeps the name it has in its model."""
    weight = linked(tensor)
    value: ir.TensorProtocol
    if weight is None:
        value = TorchTensor(tensor.detach(), name=name)
    else:
        value = CheckpointTensor(weight.stored, tensor.dtype, weight.name)
    return ir.Value(name=value.name, shape=ir.Shape(value.shape), type=ir.TensorType(value.dtype), const_value=value)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a checkpoint, as its index lists them.

    Raises:
        ModelError: there are none, or a file that the index names is missing.
    """
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    if not (folder / INDEX_FILE).is_file():
        _refuse_unindexed(folder)
        raise ModelError(
            f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: no *.safetensors weights",
            expected="weights in safetensors format; pickled .bin files can run code and are not read",
            fix="convert them with save_pretrained of transformers",
        )
    names = sorted(set(_weight_map(folder / INDEX_FILE).values()))
    for name in names:
        if "/" in name or "\\" in name or len(os.fsencode(name)) > 255 or not (folder / name).is_file():
            raise ModelError(f"{folder / INDEX_FILE} names {name[:100]!r}, which is not there", expected=_EXPECTED)
    return tuple(folder / name for name in names)


def _refuse_unindexed(folder: Path) -> None:
    """Refuse a folder whose safetensors files are those of an adapter, or lack their index."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if names == [ADAPTER_FILE]:
        raise ModelError(
            f"{folder} has the weights of an adapter ({ADAPTER_FILE}), and none of a model",
            expected=_EXPECTED,
            fix="merge the adapter into its base model with merge_and_unload of peft, and save the model",
        )
    if names:
        raise ModelError(
            f"{folder} has {', '.join(names[:3])}{' and others' if names[3:] else ''}, but no {INDEX_FILE}",
            expected=f"{SINGLE_FILE}, or shards with their index",
            fix=f"download {INDEX_FILE} too" if names[1:] else f"rename the file to {SINGLE_FILE} if it is complete",
        )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint by its key, from the headers of its files.

    Raises:
        ModelError: a file is missing, truncated or not in safetensors format.
    """
    tensors = {key: tensor for file in weight_files(folder) for key, tensor in _tensors_of(file).items()}
    if (folder / SINGLE_FILE).is_file():
        return tensors
    wanted = _weight_map(folder / INDEX_FILE)
    lacking = sorted(wanted.keys() - tensors.keys())
    if lacking:
        raise ModelError(
            f"{wanted[lacking[0]]} has no tensor {lacking[0]}", expected="every tensor that the index lists"
        )
    return {key: tensors[key] for key in wanted}


def _fill(stream: FileIO, content: memoryview, tensor: StoredTensor) -> None:
    """Read until ``content`` is full; one system call reads at most 2 GiB, and may read less."""
    while content:
        count = stream.readinto(content)
        if not count:
            raise ModelError(f"{tensor.file} ends inside the tensor {tensor.key}", expected=_EXPECTED)
        content = content[count:]


def _weight_map(index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError("too large")
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map is not a map of names to files")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(f"{index} cannot be read ({error})", expected="a weight_map of names to files") from error
    return weight_map


def _tensors_of(file: Path) -> dict[str, StoredTensor]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (header_bytes,) = struct.unpack("<Q", stream.read(8))
            if header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        return {key: _tensor_of(file, key, entry, 8 + header_bytes, size) for key, entry in header.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error, RecursionError) as error:
        raise ModelError(f"{file} cannot be loaded ({error})", expected=_EXPECTED) from error


def _tensor_of(file: Path, key: str, entry: dict[str, Any], start: int, file_bytes: int) -> StoredTensor:
    dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    if begin < 0 or min(shape, default=0) < 0 or start + end > file_bytes:
        raise ValueError(f"{key} lies outside the file")
    known = BY_SAFETENSORS.get(dtype)
    if known is not None and end - begin != math.prod(shape) * known.bits // 8:
        raise ValueError(f"{key} has {end - begin} bytes, not those of {dtype} {list(shape)}")
    return StoredTensor(key=key, file=file, dtype=dtype, shape=shape, offset=start + begin)
