"""The interface of all backends: named arrays in, named arrays out, checked before every run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import ml_dtypes  # noqa: F401 - gives numpy its "bfloat16"
import numpy as np
import numpy.typing as npt

from promprune.closing import Closing
from promprune.errors import BackendError
from promprune.package.manifest import TensorRecord

__all__ = ["Array", "DeviceTensor", "RowCopy", "Session", "Value"]

Array = npt.NDArray[Any]


class DeviceTensor(Protocol):
    """A tensor that stays on the device where the backend computed it.

    Its memory is valid as long as this object exists. It can be an input of later runs of any session of the same
    backend and device.
    """

    @property
    def dtype(self) -> str:
        """Numpy's name of the element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def nbytes(self) -> int:
        """Its size, in bytes."""

    def numpy(self) -> Array:
        """Return its content as an array on the host; do not write to it."""


Value = Array | DeviceTensor
BoundRun: TypeAlias = "Callable[[Mapping[str, Value]], dict[str, DeviceTensor]]"


@dataclass(frozen=True, eq=False)
class RowCopy:
    """A copy of some rows of one tensor into another; rows are along the last axis.

    Attributes:
        source: the tensor to copy from.
        start: first row to copy.
        count: number of rows.
        at: row of the other tensor that receives the first one.
    """

    source: Value
    start: int
    count: int
    at: int


class Session(Closing):
    """One graph, loaded on one device. Safe to run from several threads at once.

    Attributes:
        inputs, outputs: the graph's tensors by name.
        device: the device it runs on: ``"CPU"`` or ``"CUDA"``.
        notes: why it runs on this device and in this way, in words.
        limits: name of a dynamic dimension -> its largest size, for dimensions that the backend limits.
        copies_on_device: whether :meth:`copy_rows` copies tensors on the device without the host.
        repeats: whether runs of equal shapes are recorded and replayed, so that padding to equal shapes pays off.
        on_run: called with the inputs of every run before it begins.
    """

    name: str
    inputs: Mapping[str, TensorRecord]
    outputs: Mapping[str, TensorRecord]
    device: str
    notes: tuple[str, ...] = ()
    limits: Mapping[str, int] = MappingProxyType({})
    repeats: bool = False
    copies_on_device: bool = False
    on_run: Callable[[Mapping[str, Value]], None] | None = None

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph on host arrays and return every output as a host array.

        Raises:
            BackendError: a name, dtype or shape is not the graph's, or the backend fails.
        """
        self._begin(inputs)
        return {name: value.numpy() for name, value in self._run(inputs, keep=()).items()}

    def run_keeping(self, inputs: Mapping[str, Value], keep: Collection[str]) -> dict[str, DeviceTensor]:
        """Like :meth:`run`, for host arrays or device tensors; the outputs named in ``keep`` stay on the device.

        The other outputs are copied to the host, so calling ``numpy()`` on them is free.

        Raises:
            BackendError: a name, dtype or shape is not the graph's, or the backend fails.
        """
        self._begin(inputs)
        return self._run(inputs, keep=keep)

    def copy_rows(self, shape: tuple[int, ...], dtype: str, copies: Sequence[RowCopy]) -> Value:
        """Return a tensor of zeros with rows of other tensors copied into it, in order; on the session's device.

        Raises:
            BackendError: the rows have different sizes.
        """
        self._check_rows(shape[-1], copies)
        whole = np.zeros(shape, dtype)
        rows = whole.reshape(-1, shape[-1])
        for part in copies:
            array = part.source if isinstance(part.source, np.ndarray) else part.source.numpy()
            found = array.reshape(-1, shape[-1])[part.start : part.start + part.count]
            rows[part.at : part.at + part.count] = found
        return whole

    def resize(self, tensor: Value, length: int, capacity: int) -> Value:
        """Return a copy of a tensor [a, b, size, d] as [a, b, capacity, d]: the first ``length`` entries, then zeros.

        It is on the session's device, and :meth:`run_in_place` may write to it.
        """
        array = tensor if isinstance(tensor, np.ndarray) else tensor.numpy()
        copy = np.zeros((*array.shape[:2], capacity, array.shape[3]), array.dtype)
        copy[:, :, :length] = array[:, :, :length]
        return copy

    def run_in_place(self, inputs: Mapping[str, Value], grown: Mapping[str, str], at: int) -> dict[str, DeviceTensor]:
        """Like :meth:`run_keeping`, for outputs that extend inputs: the new entries are written into the inputs.

        Args:
            inputs: the inputs; those that are written to must come from :meth:`resize`.
            grown: output [a, b, size + new, d] -> the input [a, b, size, d] that it extends.
            at: index along the third axis of that input where the ``new`` entries are written.

        Returns:
            The other outputs, on the host.

        Raises:
            BackendError: a name, dtype or shape is not the graph's, or the backend fails.
        """
        outputs = self.run_keeping(inputs, keep=())
        for output, name in grown.items():
            target: Any = inputs[name]
            new = outputs.pop(output).numpy()[:, :, target.shape[2] :]
            target[:, :, at : at + new.shape[2]] = new
        return outputs

    def bind_buffers(self, buffers: Mapping[str, Array], updated: Mapping[str, str]) -> BoundRun:
        """Return a function that runs the graph on the same buffers each time.

        Args:
            buffers: inputs by name, C-contiguous.
            updated: output -> the buffer that it is written to, which has its dtype and shape.

        Returns:
            A function of the other inputs that returns the other outputs, on the host; for one thread at a time. It
            raises a BackendError if a name, dtype or shape is not the graph's, or the backend fails.

        Raises:
            BackendError: a buffer is not what the graph takes.
        """

        def run(inputs: Mapping[str, Value]) -> dict[str, DeviceTensor]:
            outputs = self.run_keeping({**inputs, **buffers}, keep=())
            for output, name in updated.items():
                buffers[name][...] = outputs.pop(output).numpy()
            return outputs

        return run

    @abstractmethod
    def _run(self, inputs: Mapping[str, Value], keep: Collection[str]) -> dict[str, DeviceTensor]:
        """Run with inputs that were checked."""

    @abstractmethod
    def close(self) -> None:
        """Free the graph; running it afterwards raises a BackendError."""

    def _check_rows(self, size: int, copies: Sequence[RowCopy]) -> None:
        """Refuse rows of another size, which would otherwise be copied as a different number of rows."""
        for part in copies:
            if part.source.shape[-1] != size:
                raise BackendError(f"{self.name} received rows of {part.source.shape[-1]} numbers", expected=str(size))

    def _begin(self, inputs: Mapping[str, Value], bound: Collection[str] = ()) -> None:
        self._check(inputs, bound)
        if self.on_run is not None:
            self.on_run(inputs)

    def _check(self, inputs: Mapping[str, Value], bound: Collection[str] = ()) -> None:
        """Refuse inputs that are not the graph's, apart from those that are ``bound`` already."""
        wanted = self.inputs.keys() - set(bound)
        if inputs.keys() != wanted:
            raise BackendError(
                f"{self.name} received inputs {sorted(inputs)}",
                expected=f"{sorted(wanted)}",
            )
        sizes: dict[str, int] = {}
        for name, value in inputs.items():
            spec = self.inputs[name]
            dtype, shape = str(value.dtype), tuple(value.shape)
            if dtype != spec.dtype or not _fits(shape, spec.shape, sizes):
                known = f" with {sizes}" if sizes else ""
                raise BackendError(
                    f"{self.name} received {name}: {dtype}{list(shape)}",
                    expected=f"{spec}{known}",
                )


def _fits(shape: tuple[int, ...], expected: tuple[int | str, ...], sizes: dict[str, int]) -> bool:
    """Compare a shape with the expected one; dimensions of the same name must have one size in all inputs of a run."""
    if len(shape) != len(expected):
        return False
    for size, dimension in zip(shape, expected, strict=True):
        wanted = sizes.setdefault(dimension, size) if isinstance(dimension, str) else dimension
        if size != wanted:
            return False
    return True
