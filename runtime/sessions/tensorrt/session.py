"""TensorRT and TensorRT for RTX: running the engines that ``promprune-build`` wrote for this machine's GPU.

Everything that needs the driver is hidden by :class:`Device` and :class:`DeviceEngine`; the rest is ordinary Python
and is tested without a GPU. Outputs that are kept stay in device memory, and are passed to the next engine by address.
"""

from __future__ import annotations

import functools
import math
import statistics
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from promprune.errors import BackendError
from promprune.package.agree import differences
from promprune.package.engines import EngineRecord, current_target, read_plan
from promprune.package.package import Package
from promprune.runtime.sessions.base import Array, DeviceTensor, RowCopy, Session, Value
from promprune.runtime.sessions.config import RuntimeConfig
from promprune.runtime.sessions.tensorrt.cuda import CudaDevice
from promprune.runtime.sessions.tensorrt.device import (
    BufferPool,
    Device,
    DeviceArray,
    DeviceContext,
    DeviceEngine,
    DeviceGraph,
)
from promprune.runtime.sessions.tensorrt.lookup import choose_profile, find_engines
from promprune.runtime.sessions.tensorrt.modules import load_tensorrt

__all__ = ["TensorRtSession", "open_session"]

_MOST_GRAPHS: Final = 16  # sets of shapes per engine with their own buffers and CUDA graph
_BATCH: Final = "batch_size"
_PAST: Final = "past_sequence_length"


def open_session(package: Package, graph: str, config: RuntimeConfig) -> TensorRtSession:
    """Load the engine of one graph of a package, on the first CUDA device.

    Raises:
        PackageError: there are no engines for this GPU, or they are stale; the message gives the command to build them.
        BackendError: there is no driver, the engine does not load, or ``config.provider`` is neither ``"auto"`` nor
            ``"cuda"``.
        MissingDependencyError: TensorRT or the CUDA bindings are not installed.
    """
    if config.provider not in ("auto", "cuda"):
        raise BackendError(
            f"received provider {config.provider!r} for the backend tensorrt",
            expected="auto or cuda",
            fix="omit --provider, or use it with --backend onnxruntime",
        )
    backend, folder, manifest, notes = find_engines(package, current_target())
    record, trt = manifest.engines[graph], load_tensorrt(backend)
    session = TensorRtSession(folder, record, _shared_device(), trt, cuda_graphs=config.cuda_graphs)
    session.notes += notes
    return session


class TensorRtSession(Session):
    """One engine on one device.

    Outputs that grow with the text (keys and values) alternate between two buffers of the largest size that the
    engine was built for. If runs are recorded, a step in place writes to a third buffer, which all graphs share, and
    the new entries are copied from there.

    Args:
        folder: folder of the engines.
        record: record of the engine in ``engine.json``.
        device: the device; sessions that exchange tensors share one device.
        trt: the module that built it: ``tensorrt`` or ``tensorrt_rtx``.
        cuda_graphs: whether runs whose shapes repeat are recorded and replayed.

    Raises:
        PackageError: the engine cannot be read, or was changed since it was built.
        BackendError: it does not load, or its inputs and outputs differ from its record.
    """

    copies_on_device = True

    def __init__(
        self, folder: Path, record: EngineRecord, device: Device, trt: Any, *, cuda_graphs: bool = False
    ) -> None:
        self.name = record.file
        self.device = "CUDA"
        self.inputs = {tensor.name: tensor for tensor in record.inputs}
        self.outputs = {tensor.name: tensor for tensor in record.outputs}
        self.notes = (f"engines of {trt.__name__} {trt.__version__} from {folder}",)
        self._record = record
        self._device = device
        self._lock = threading.Lock()
        self.repeats = cuda_graphs and _repeats(record)
        self._static = cuda_graphs and _is_static(record)
        self._replays: dict[tuple[int, ...], _Replay] = {}
        engine = device.load(read_plan(folder, record), trt, (folder / record.file).with_suffix(".runtime-cache"))
        for differing in differences(engine.inputs, engine.outputs, record):
            raise BackendError(
                f"{folder / record.file} has {differing.tensor}: {differing.found}",
                expected=f"{differing.expected}, as its record says",
                fix="run promprune-build with --rebuild",
            )
        self._opened: _Opened | None = _Opened(engine, engine.context())
        self.limits = _limits(record)
        self._pools = _pools(record, self.limits, device)
        self._roomy = BufferPool(device, max((pool.nbytes for pool in self._pools.values()), default=0))
        self._scratch: dict[str, DeviceArray] = {}

    def layer_times(self, inputs: Mapping[str, Value], *, runs: int = 10) -> dict[str, float]:
        """Return the median time of every layer of the engine, in milliseconds, in the order of execution.

        Raises:
            BackendError: a name, dtype or shape is not the graph's, or the backend fails.
        """
        self._check(inputs)
        times: dict[str, list[float]] = {}
        with self._lock:
            context = self._require_open().context
            tensors, outputs = self._prepare_run(context, inputs)
            for _ in range(runs):
                for layer, milliseconds in context.layer_times(_addresses({**tensors, **outputs})):
                    times.setdefault(layer, []).append(milliseconds)
        return {layer: statistics.median(found) for layer, found in times.items()}

    def copy_rows(self, shape: tuple[int, ...], dtype: str, copies: Sequence[RowCopy]) -> Value:
        """Copy rows of tensors into a new tensor on the device; see :meth:`Session.copy_rows`."""
        self._check_rows(shape[-1], copies)
        whole = DeviceArray(self._device, shape, dtype)
        whole.clear()
        rows = DeviceArray(self._device, (math.prod(shape[:-1]), shape[-1]), dtype, memory=whole)
        sources = [self._on_device(_convert(dtype, part.source)) for part in copies]
        for part, source in zip(copies, sources, strict=True):
            rows.paste(source, axis=0, start=part.start, at=part.at, count=part.count)
        self._device.synchronize()
        return whole

    def resize(self, tensor: Value, length: int, capacity: int) -> Value:
        """Return a copy of a tensor with another capacity; see :meth:`Session.resize`."""
        source = self._on_device(tensor)
        shape = (*source.shape[:2], capacity, *source.shape[3:])
        copy = DeviceArray(self._device, shape, source.dtype, self._roomy if capacity > length else None)
        if capacity > length:
            copy.clear()  # the old content of the memory may be NaN
        copy.paste(source, axis=2, start=0, at=0, count=length)
        if source is not tensor:
            self._device.synchronize()
        return copy

    def run_in_place(self, inputs: Mapping[str, Value], grown: Mapping[str, str], at: int) -> dict[str, DeviceTensor]:
        """Run a step; steps of equal shapes are a CUDA graph from the second one on; see :class:`Session`."""
        self._begin(inputs)
        fixed = {name: value for name in grown.values() if isinstance(value := inputs[name], DeviceArray)}
        with self._lock:  # the buffers are shared by all steps
            replay = self._replay(inputs, fixed)
            for output, name in grown.items():
                size, made = fixed[name].shape[2], replay.outputs[output]
                fixed[name].paste(made, axis=2, start=size, at=at, count=made.shape[2] - size)
            return self._fetch_outputs(replay, replay.outputs.keys() - grown.keys())

    def _run(self, inputs: Mapping[str, Value], keep: Collection[str]) -> dict[str, DeviceTensor]:
        if self._static:
            with self._lock:  # the buffers are shared by all runs of these shapes
                replay = self._replay(inputs, {})
                kept = {name: self._copy_to_new(replay.outputs[name]) for name in keep}
                return {**self._fetch_outputs(replay, replay.outputs.keys() - kept.keys()), **kept}
        with self._lock:  # the context's shapes and addresses are shared
            context = self._require_open().context
            tensors, outputs = self._prepare_run(context, inputs)
            context.enqueue(_addresses({**tensors, **outputs}))
        for name, tensor in outputs.items():
            if name not in keep:
                tensor.fetch()
        self._device.synchronize()  # from here on, uploaded host arrays may change
        return dict(outputs)

    def _prepare_run(
        self, context: DeviceContext, inputs: Mapping[str, Value], *, in_place: bool = False
    ) -> tuple[dict[str, DeviceArray], dict[str, DeviceArray]]:
        """Copy the inputs to the device, set their shapes, and allocate the outputs."""
        profile = choose_profile(self._record, {name: tuple(value.shape) for name, value in inputs.items()})
        tensors = {name: self._on_device(value) for name, value in inputs.items()}
        shapes = context.prepare(profile, {name: tensor.shape for name, tensor in tensors.items()})
        memory = self._shared_outputs() if in_place else {}
        outputs = {
            name: DeviceArray(self._device, shapes[name], spec.dtype, self._pools.get(name), memory=memory.get(name))
            for name, spec in self.outputs.items()
        }
        return tensors, outputs

    def _shared_outputs(self) -> Mapping[str, DeviceArray]:
        """Return buffers for the growing outputs, shared by all recorded runs: new entries are copied out at once."""
        for name, pool in self._pools.items():
            if name not in self._scratch:
                self._scratch[name] = DeviceArray(self._device, (pool.nbytes,), "uint8", pool)
        return self._scratch

    def _replay(self, inputs: Mapping[str, Value], fixed: Mapping[str, DeviceArray]) -> _Replay:
        """Run at the addresses of the last run of these shapes, as a CUDA graph from the second time on.

        Args:
            inputs: all inputs.
            fixed: the inputs that are read in place; the others are copied into buffers of the graph.
        """
        engine = self._require_open().engine
        shapes = (size for name in self.inputs for size in inputs[name].shape)
        key = (*shapes, *(tensor.address for tensor in fixed.values()))
        replay = self._replays.pop(key, None)
        if replay is None:
            replay = self._record_run(engine, inputs, fixed)
        else:
            for name, tensor in replay.inputs.items():
                _copy(inputs[name], tensor)
            replay.run()
        while len(self._replays) >= _MOST_GRAPHS:
            self._replays.pop(next(iter(self._replays)))
        self._replays[key] = replay  # at the end: most recently used
        return replay

    def _record_run(
        self, engine: DeviceEngine, inputs: Mapping[str, Value], fixed: Mapping[str, DeviceArray]
    ) -> _Replay:
        """Run once normally, as TensorRT requires, and then record a run in its own context."""
        context = engine.context(recorded=True)
        owned = {}
        for name, value in inputs.items():
            if name not in fixed:
                owned[name] = DeviceArray(self._device, tuple(value.shape), str(value.dtype))
                _copy(value, owned[name])
        tensors, outputs = self._prepare_run(context, {**owned, **fixed}, in_place=bool(fixed))
        replay = _Replay(context, _addresses({**tensors, **outputs}), owned, outputs)
        replay.run()
        try:
            replay.graph = context.capture(replay.addresses)
        except BackendError as error:  # for example a loop whose length is computed on the device
            note = f"{self.name} runs without a CUDA graph: {error}"
            self.notes = tuple(dict.fromkeys((*self.notes, note)))
        return replay

    def _fetch_outputs(self, replay: _Replay, names: Collection[str]) -> dict[str, DeviceTensor]:
        found = {name: _HostOutput(tensor.fetch()) for name, tensor in replay.outputs.items() if name in names}
        self._device.synchronize()
        return dict(found)

    def _copy_to_new(self, tensor: DeviceArray) -> DeviceArray:
        copy = DeviceArray(self._device, tensor.shape, tensor.dtype)
        _copy(tensor, copy)
        return copy

    def _require_open(self) -> _Opened:
        if self._opened is None:
            raise BackendError(f"{self.name} was closed", fix="load the package again")
        return self._opened

    def _on_device(self, value: Value) -> DeviceArray:
        if isinstance(value, DeviceArray) and value.device is self._device:
            return value
        array = np.ascontiguousarray(value if isinstance(value, np.ndarray) else value.numpy())
        tensor = DeviceArray(self._device, tuple(array.shape), str(array.dtype))
        tensor.write(array)
        return tensor

    def close(self) -> None:
        """Free the engine; running it afterwards is a BackendError."""
        with self._lock:
            opened, self._opened = self._opened, None
            self._replays.clear()
            self._scratch.clear()
        if opened is not None:
            opened.engine.close()
            for pool in (*self._pools.values(), self._roomy):
                pool.close()


@dataclass(frozen=True, eq=False)
class _Opened:
    """A loaded engine, and the context of all runs that are not recorded."""

    engine: DeviceEngine
    context: DeviceContext


@dataclass(eq=False)
class _Replay:
    """The buffers of all runs of one engine with the same shapes, and their CUDA graph.

    Attributes:
        context: context for these runs only, because a graph becomes invalid when the shapes of its context change.
        addresses: addresses of all inputs and outputs, including tensors that are read in place.
        inputs: buffers of the inputs, except those that are read in place.
        outputs: buffers of the outputs.
        graph: a recorded run; None if there is none yet, or if the engine records its runs itself.
    """

    context: DeviceContext
    addresses: Mapping[str, int]
    inputs: Mapping[str, DeviceArray]
    outputs: Mapping[str, DeviceArray]
    graph: DeviceGraph | None = None

    def run(self) -> None:
        """Run with the current content of the input buffers."""
        if self.graph is not None:
            self.graph.launch()
        else:
            self.context.enqueue(self.addresses)


class _HostOutput:
    """An output that was copied to the host; satisfies :class:`DeviceTensor`."""

    def __init__(self, array: Array) -> None:
        self._array = array
        self.dtype, self.shape, self.nbytes = str(array.dtype), tuple(array.shape), array.nbytes

    def numpy(self) -> Array:
        """Return the array."""
        return self._array


def _addresses(tensors: Mapping[str, DeviceArray]) -> dict[str, int]:
    return {name: tensor.address for name, tensor in tensors.items()}


def _convert(dtype: str, value: Value) -> Value:
    """Convert a tensor to another dtype on the host; return it unchanged if it has that dtype."""
    if str(value.dtype) == dtype:
        return value
    return (value if isinstance(value, np.ndarray) else value.numpy()).astype(dtype)


def _copy(value: Value, target: DeviceArray) -> None:
    """Begin to copy a tensor from the host or the device into one of the same shape and dtype."""
    if isinstance(value, DeviceArray) and value.device is target.device:
        target.paste(value, axis=0, start=0, at=0, count=target.shape[0])
    else:
        target.write(np.ascontiguousarray(value if isinstance(value, np.ndarray) else value.numpy()))


def _repeats(record: EngineRecord) -> bool:
    """Whether runs are recorded: those with static shapes, or with keys and values in buffers of the largest size."""
    return _is_static(record) or any(_PAST in tensor.shape for tensor in record.inputs)


def _is_static(record: EngineRecord) -> bool:
    """Whether all dimensions except the batch are fixed, so that shapes repeat."""
    return all(dim == _BATCH for tensor in record.inputs for dim in tensor.shape if isinstance(dim, str))


def _limits(record: EngineRecord) -> dict[str, int]:
    """Return the largest size of each dynamic dimension, by name."""
    most: dict[str, int] = {}
    for tensor in record.inputs:
        for profile in record.profiles:
            for dim, size in zip(tensor.shape, profile.shapes[tensor.name].max, strict=True):
                if isinstance(dim, str):
                    most[dim] = max(size, most.get(dim, 0))
    return most


def _pools(record: EngineRecord, most: Mapping[str, int], device: Device) -> dict[str, BufferPool]:
    """Make a buffer pool for every output that grows from run to run."""
    pools = {}
    for tensor in record.outputs:
        dynamic = [dim for dim in tensor.shape if isinstance(dim, str)]
        if set(dynamic) - {_BATCH} and all(dim in most for dim in dynamic):
            count = math.prod(most[dim] if isinstance(dim, str) else dim for dim in tensor.shape)
            pools[tensor.name] = BufferPool(device, max(count * np.dtype(tensor.dtype).itemsize, 1))
    return pools


@functools.cache
def _shared_device() -> CudaDevice:
    """Return the device that all sessions of the process share, so that they can exchange tensors."""
    return CudaDevice()
