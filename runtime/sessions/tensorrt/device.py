"""Interfaces for device memory and engines, which hide everything that needs a driver, and buffers built on them."""

from __future__ import annotations

import heapq
import math
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from promprune.package.manifest import TensorRecord
from promprune.runtime.sessions.base import Array

__all__ = [
    "BufferPool",
    "Device",
    "DeviceArray",
    "DeviceContext",
    "DeviceEngine",
    "DeviceGraph",
    "Pitched",
    "Shapes",
]

_SMALLEST: Final = 1  # bytes; an empty tensor needs an address too

Shapes = Mapping[str, tuple[int, ...]]


class DeviceGraph(Protocol):
    """A recorded run, at fixed addresses."""

    def launch(self) -> None:
        """Enqueue the recorded run on the device's stream; returns before it is done."""


class DeviceContext(Protocol):
    """An execution context of an engine, with its own shapes. Not thread-safe.

    A recorded run is valid until the shapes of its context change. All contexts of an engine share its scratch memory,
    so only one of them may run at a time.
    """

    def prepare(self, profile: int, inputs: Shapes) -> Shapes:
        """Choose a profile, set the input shapes, and return the shapes of the outputs."""

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Enqueue a run on the stream, with inputs and outputs at these addresses; returns before it is done."""

    def capture(self, addresses: Mapping[str, int]) -> DeviceGraph | None:
        """Record a run after it was prepared and run once; return None if the engine records its runs itself."""

    def layer_times(self, addresses: Mapping[str, int]) -> list[tuple[str, float]]:
        """Run once, and return the name and time of every layer, in milliseconds."""


class DeviceEngine(Protocol):
    """One engine on the device."""

    @property
    def inputs(self) -> tuple[TensorRecord, ...]:
        """Its inputs."""

    @property
    def outputs(self) -> tuple[TensorRecord, ...]:
        """Its outputs."""

    def context(self, *, recorded: bool = False) -> DeviceContext:
        """Return a new execution context, which is ``recorded`` or not."""

    def close(self) -> None:
        """Save what the next load can use, such as compiled kernels."""


class Device(Protocol):
    """Memory and engines of one GPU, on one stream. Thread-safe."""

    def load(self, plan: bytes, trt: Any, runtime_cache: Path) -> DeviceEngine:
        """Load a serialized engine with ``tensorrt`` or ``tensorrt_rtx``.

        TensorRT for RTX stores the kernels that it compiles on this machine in the file ``runtime_cache``.
        """

    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory."""

    def free(self, address: int) -> None:
        """Free memory after all work enqueued so far is done; returns at once."""

    def upload(self, array: Array, address: int) -> None:
        """Copy a contiguous array to the device; it must stay unchanged until :meth:`synchronize`."""

    def download(self, address: int, array: Array) -> None:
        """Copy from the device into a contiguous array; it is complete after :meth:`synchronize`."""

    def clear(self, address: int, nbytes: int) -> None:
        """Begin to fill memory with zeros."""

    def copy(self, source: Pitched, target: Pitched, width: int, height: int) -> None:
        """Begin to copy ``height`` rows of ``width`` bytes, at most a pitch, from ``source`` to ``target``."""

    def synchronize(self) -> None:
        """Wait for all work enqueued so far."""


class Pitched(NamedTuple):
    """Rows of bytes in device memory: the address of the first row, and the distance between rows in bytes."""

    address: int
    pitch: int


class BufferPool:
    """Reusable device buffers of one size; a buffer is reused only after its holder has released it.

    A KV cache that grows step by step alternates between two buffers: an engine reads one and writes the other. If
    an older cache is still in use, it keeps its buffer, and a third one is allocated.

    Args:
        device: the device.
        nbytes: size of every buffer, that of the largest tensor it has to hold.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes = nbytes
        self._device = device
        self._free: list[int] = []
        self._lock = threading.RLock()  # reentrant: garbage collection can release a buffer in this very thread
        self._closed = False

    def take(self) -> int:
        """Return the address of a free buffer: the lowest one, so that the same buffers are used again."""
        with self._lock:
            if self._free:
                return heapq.heappop(self._free)
        return self._device.allocate(self.nbytes)

    def release(self, address: int) -> None:
        """Release a buffer for reuse; the stream orders earlier work on it before the next."""
        with self._lock:
            if not self._closed:
                heapq.heappush(self._free, address)
                return
        self._device.free(address)

    def close(self) -> None:
        """Free the buffers that are not in use, and each of the others when it is released."""
        with self._lock:
            self._closed, free, self._free = True, self._free, []
        for address in free:
            self._device.free(address)


class DeviceArray:
    """A contiguous tensor in device memory, which is freed with this object; satisfies :class:`DeviceTensor`.

    Args:
        device: the device.
        shape: its shape.
        dtype: numpy's name of the element type.
        pool: pool for its memory, if the buffers are large enough; None to allocate memory.
        memory: another tensor of the same size whose memory is shared, and kept alive; None for new memory.
    """

    address: int

    def __init__(
        self,
        device: Device,
        shape: tuple[int, ...],
        dtype: str,
        pool: BufferPool | None = None,
        *,
        memory: DeviceArray | None = None,
    ) -> None:
        self.device, self.shape, self.dtype = device, shape, dtype
        self._host: Array | None = None
        self._source: Array | None = None  # must stay alive until the copy is done
        self._memory = memory
        if memory is not None:
            self.address = memory.address
            return
        pooled = pool is not None and self.nbytes <= pool.nbytes
        self.address = pool.take() if pool and pooled else device.allocate(max(self.nbytes, _SMALLEST))
        # At exit the driver frees all memory, and may be unloaded before this object is deleted.
        weakref.finalize(self, pool.release if pool and pooled else device.free, self.address).atexit = False

    @property
    def nbytes(self) -> int:
        """Its size, in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def write(self, array: Array) -> None:
        """Begin to copy a contiguous array of the same shape and dtype into this tensor."""
        self._source, self._host = array, None
        if array.nbytes:
            self.device.upload(array, self.address)

    def clear(self) -> None:
        """Begin to fill it with zeros."""
        self._host = None
        if self.nbytes:
            self.device.clear(self.address, self.nbytes)

    def paste(self, source: DeviceArray, *, axis: int, start: int, at: int, count: int) -> None:
        """Begin to copy entries of another tensor on this device; except along the axis, both have the same shape.

        Args:
            source: the other tensor.
            axis: the axis of the entries.
            start: index of the first entry in ``source``.
            at: index where it is written in this tensor.
            count: number of entries.
        """
        self._host = None
        inner = math.prod(self.shape[axis + 1 :]) * np.dtype(self.dtype).itemsize
        rows = math.prod(self.shape[:axis])
        width = count * inner
        if rows * width:
            pitches = (source.shape[axis] * inner, self.shape[axis] * inner) if rows > 1 else (width, width)
            there, here = source.address + start * inner, self.address + at * inner
            self.device.copy(Pitched(there, pitches[0]), Pitched(here, pitches[1]), width, rows)

    def fetch(self) -> Array:
        """Begin to copy the tensor to the host; the array is complete after the device was synchronised."""
        self._host = np.empty(self.shape, self.dtype)
        if self.nbytes:
            self.device.download(self.address, self._host)
        return self._host

    def numpy(self) -> Array:
        """Return its content as an array on the host; do not write to it."""
        if self._host is None:
            self.fetch()
            self.device.synchronize()
        assert self._host is not None
        return self._host
