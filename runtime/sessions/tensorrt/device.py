"""Device memory and engines as the TensorRT session sees them: everything that needs a driver is behind these."""

from __future__ import annotations

import heapq
import math
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
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
    "EngineLoading",
    "Pitched",
    "Shapes",
]

_SMALLEST: Final = 1  # bytes; an empty tensor needs an address too

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class EngineLoading:
    """How an engine is loaded.

    Attributes:
        runtime_cache: where TensorRT for RTX keeps the kernels that it compiles on this machine.
        cuda_graphs: runs are at the same addresses again and again, and may be replayed as a CUDA graph.
    """

    runtime_cache: Path | None = None
    cuda_graphs: bool = False


class DeviceGraph(Protocol):
    """A recorded run, at fixed addresses."""

    def launch(self) -> None:
        """Run again on the device's stream; returns before it is done."""


class DeviceContext(Protocol):
    """A way of running an engine, with shapes of its own. Not safe to use from two threads at once.

    What is recorded of it holds until its shapes change. All contexts of an engine share its scratch memory, so that
    one of them runs at a time.
    """

    def prepare(self, profile: int, inputs: Shapes) -> Shapes:
        """Choose a profile, set the input shapes, and return the shapes of the outputs."""

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Run on the device's stream, with every input and output at its address; returns before it is done."""

    def capture(self, addresses: Mapping[str, int]) -> DeviceGraph | None:
        """Record a run that was prepared, and made once; ``None`` where the engine records its runs itself."""

    def layer_times(self, addresses: Mapping[str, int]) -> list[tuple[str, float]]:
        """Run once, and return every layer's name and time, in milliseconds."""


class DeviceEngine(Protocol):
    """One engine on the device."""

    @property
    def inputs(self) -> tuple[TensorRecord, ...]:
        """Its inputs."""

    @property
    def outputs(self) -> tuple[TensorRecord, ...]:
        """Its outputs."""

    def context(self, *, recorded: bool = False) -> DeviceContext:
        """Return a new way of running it, to be recorded or not."""

    def close(self) -> None:
        """Keep what the next load can use, such as compiled kernels."""


class Device(Protocol):
    """Memory and engines of one GPU, in the order of one stream. Safe to use from several threads."""

    def load(self, plan: bytes, trt: Any, loading: EngineLoading) -> DeviceEngine:
        """Load a serialized engine with ``tensorrt`` or ``tensorrt_rtx``."""

    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory."""

    def free(self, address: int) -> None:
        """Free memory once all work enqueued so far is done; returns at once."""

    def upload(self, array: Array, address: int) -> None:
        """Copy a contiguous array to the device; it must stay unchanged until :meth:`synchronize`."""

    def download(self, address: int, array: Array) -> None:
        """Copy from the device into a contiguous array; it is complete after :meth:`synchronize`."""

    def clear(self, address: int, nbytes: int) -> None:
        """Begin to fill memory with zeros."""

    def copy(self, source: Pitched, target: Pitched, width: int, height: int) -> None:
        """Begin to copy ``height`` rows of ``width`` bytes each, at most a pitch, from one place to another."""

    def synchronize(self) -> None:
        """Wait for all work enqueued so far."""


class Pitched(NamedTuple):
    """Rows of bytes in device memory: where the first begins, and how many bytes lie between two beginnings."""

    address: int
    pitch: int


class BufferPool:
    """Device memory of one size, given out again once its holder is gone: what is alive is never overwritten.

    A KV cache that grows step by step lives in two such buffers in turn: an engine reads the one and writes the
    other. Somebody who keeps an older cache keeps its buffer, and a third is made.

    Args:
        device: where it lies.
        nbytes: size of every buffer; that of the largest tensor it has to hold.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes = nbytes
        self._device = device
        self._free: list[int] = []
        self._lock = threading.RLock()  # a holder may vanish, and give back, at any moment of this very thread
        self._closed = False

    def take(self) -> int:
        """Return the address of a buffer that nobody holds: the lowest, so that the same come again and again."""
        with self._lock:
            if self._free:
                return heapq.heappop(self._free)
        return self._device.allocate(self.nbytes)

    def give_back(self, address: int) -> None:
        """Let a buffer be given out again; what was enqueued before comes before whatever is written there next."""
        with self._lock:
            if not self._closed:
                heapq.heappush(self._free, address)
                return
        self._device.free(address)

    def close(self) -> None:
        """Free the buffers that nobody holds now, and every other one when it is given back."""
        with self._lock:
            self._closed, free, self._free = True, self._free, []
        for address in free:
            self._device.free(address)


class DeviceArray:
    """A contiguous tensor in device memory, given back with this object; satisfies :class:`DeviceTensor`.

    Args:
        device: where it lies.
        shape: its shape.
        dtype: numpy's name of the element type.
        pool: take its memory from there, if it is large enough.
        memory: lie where that tensor does, which is as large, and lives as long.
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
        self._source: Array | None = None  # kept until the copy is surely done
        self._memory = memory
        if memory is not None:
            self.address = memory.address
            return
        pooled = pool is not None and self.nbytes <= pool.nbytes
        self.address = pool.take() if pool and pooled else device.allocate(max(self.nbytes, _SMALLEST))
        # At exit the driver frees everything itself, and may be gone before us.
        weakref.finalize(self, pool.give_back if pool and pooled else device.free, self.address).atexit = False

    @property
    def nbytes(self) -> int:
        """Its size, in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def write(self, array: Array) -> None:
        """Begin to copy a contiguous array of the same shape and dtype here."""
        self._source, self._host = array, None
        if array.nbytes:
            self.device.upload(array, self.address)

    def clear(self) -> None:
        """Begin to fill it with zeros."""
        self._host = None
        if self.nbytes:
            self.device.clear(self.address, self.nbytes)

    def paste(self, source: DeviceArray, *, axis: int, start: int, at: int, count: int) -> None:
        """Begin to copy entries of another tensor on this device here; but for the axis, both have the same shape.

        Args:
            source: the tensor.
            axis: along which the entries lie.
            start: the first of them, there.
            at: its place here.
            count: how many.
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
        """Begin to copy it to the host; the array is complete once the device was synchronised."""
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
