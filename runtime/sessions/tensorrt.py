"""TensorRT and TensorRT for RTX: runs the engines that ``promprune-build`` wrote for this machine's GPU.

Everything that needs the driver is behind :class:`Device` and :class:`DeviceEngine`; the rest is ordinary Python and
is tested without a GPU. Outputs that are kept stay in device memory, and are fed to the next engine by address.
"""

from __future__ import annotations

import functools
import importlib
import threading
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from promprune.config import ENGINE_BACKENDS, EngineBackend, EngineConfig
from promprune.engines import (
    EngineManifest,
    EngineRecord,
    ProfileRecord,
    current_target,
    difference,
    engine_folder,
    identity_of,
    read_engines,
)
from promprune.errors import BackendError, MissingDependencyError, PackageError
from promprune.package import read_manifest
from promprune.runtime.sessions.base import Array, DeviceTensor, Session, SessionOptions, TensorSpec, Value
from promprune.trt_modules import ENGINE_MODULES, TENSOR_DTYPES, log_of, trimmed

__all__ = ["CudaDevice", "Device", "DeviceEngine", "TensorRtSession", "choose_profile", "find_engines", "open_session"]

_SMALLEST: Final = 1  # bytes; an empty tensor needs an address too
Shapes = Mapping[str, tuple[int, ...]]


class DeviceEngine(Protocol):
    """One engine on the device, with one execution context. Not safe to use from two threads at once."""

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Numpy's name of the element type of every input and output."""

    def prepare(self, profile: int, inputs: Shapes) -> Shapes:
        """Choose a profile, set the input shapes, and return the shapes of the outputs."""

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Run on the device's stream, with every input and output at its address; returns before it is done."""


class Device(Protocol):
    """Memory and engines of one GPU, in the order of one stream. Safe to use from several threads."""

    def load(self, plan: bytes, trt: Any) -> DeviceEngine:
        """Load a serialized engine with ``tensorrt`` or ``tensorrt_rtx``."""

    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory."""

    def free(self, address: int) -> None:
        """Free memory once all work enqueued so far is done; returns at once."""

    def upload(self, array: Array, address: int) -> None:
        """Copy a contiguous array to the device; it must stay unchanged until :meth:`synchronize`."""

    def download(self, address: int, array: Array) -> None:
        """Copy from the device into a contiguous array; it is complete after :meth:`synchronize`."""

    def synchronize(self) -> None:
        """Wait for all work enqueued so far."""


def open_session(path: Path, options: SessionOptions) -> TensorRtSession:
    """Load the engine of one graph of a package, on the first CUDA device.

    Args:
        path: the graph's ONNX file in the package; the engine is looked up beside it.
        options: ``provider`` must not be ``"cpu"``.

    Raises:
        PackageError: no engines for this GPU, or they are stale; the message is the command that builds them.
        BackendError: no driver, or the engine does not load.
        MissingDependencyError: TensorRT or the CUDA bindings are not installed.
    """
    if options.provider == "cpu":
        raise BackendError(
            "received provider 'cpu' for TensorRT", expected="auto or cuda", fix="use ONNX Runtime on the CPU"
        )
    backend, folder, manifest = find_engines(path.parent.parent, current_target())
    if path.stem not in manifest.engines:
        raise PackageError(f"{folder} has no engine of {path.stem}", fix="run promprune-build with --rebuild")
    trt = _import(backend, ENGINE_MODULES[backend])
    return TensorRtSession(folder, manifest.engines[path.stem], _shared_device(), trt)


def find_engines(package: Path, target: str) -> tuple[EngineBackend, Path, EngineManifest]:
    """Return backend, folder and manifest of the engines of a package for one target.

    Where both backends have built some, TensorRT's are taken: they were tuned on the GPU itself.

    Raises:
        PackageError: there are none, or they are stale or foreign; the message says why.
    """
    backend: EngineBackend
    for backend in ENGINE_BACKENDS:
        folder = engine_folder(package, backend, target)
        if not folder.exists():
            continue
        engines = read_engines(folder)
        version = str(_import(backend, ENGINE_MODULES[backend]).__version__)
        wanted = identity_of(read_manifest(package), EngineConfig(backend=backend), tool_version=version, target=target)
        reason = difference(engines.identity, wanted, options=False)
        if reason is not None:
            raise PackageError(
                f"the engines in {folder} cannot be used ({reason})",
                expected="engines of this package, tool and GPU",
                fix=f"promprune-build {package} --backend {backend} --target {target} --rebuild",
            )
        return backend, folder, engines
    raise PackageError(
        f"{package} has no engines for this GPU, {target}",
        expected=f"engines/tensorrt-{target} or engines/tensorrt-rtx-{target}",
        fix=f"promprune-build {package} --target {target}",
    )


def choose_profile(record: EngineRecord, shapes: Shapes) -> int:
    """Return the index of the narrowest profile that all input shapes fit.

    Raises:
        BackendError: they fit none; the message names an input, and what the engine was built for.
    """
    fitting = [(_width(p), i) for i, p in enumerate(record.profiles) if _misfit(p, shapes) is None]
    if fitting:
        return min(fitting)[1]
    name = next(misfit for profile in record.profiles if (misfit := _misfit(profile, shapes)) is not None)
    ranges = [f"{list(p.shapes[name].min)} to {list(p.shapes[name].max)} ({p.name})" for p in record.profiles]
    raise BackendError(
        f"{record.file} received {name}: {list(shapes[name])}",
        expected=" or ".join(ranges),
        fix="build engines with a larger --max-prompt-tokens, --max-new-tokens or --max-batch",
    )


def _misfit(profile: ProfileRecord, shapes: Shapes) -> str | None:
    for name, allowed in profile.shapes.items():
        bounds = zip(allowed.min, shapes[name], allowed.max, strict=True)
        if not all(low <= size <= high for low, size, high in bounds):
            return name
    return None


def _width(profile: ProfileRecord) -> int:
    return sum(sum(shape.max) - sum(shape.min) for shape in profile.shapes.values())


class TensorRtSession(Session):
    """One engine on one device.

    Args:
        folder: of the engines.
        record: of the engine, from ``engine.json``.
        device: where it runs; sessions that hand each other tensors share one device.
        trt: ``tensorrt`` or ``tensorrt_rtx``, whichever built it.

    Raises:
        BackendError: the engine does not load, or has other inputs and outputs than its record.
    """

    def __init__(self, folder: Path, record: EngineRecord, device: Device, trt: Any) -> None:
        self.name = record.file
        self.device = "CUDA"
        self.inputs = {tensor.name: TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in record.inputs}
        self.outputs = {tensor.name: TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in record.outputs}
        self._record = record
        self._device = device
        self._lock = threading.Lock()
        self._engine: DeviceEngine | None = device.load((folder / record.file).read_bytes(), trt)
        stated = {name: spec.dtype for name, spec in {**self.inputs, **self.outputs}.items()}
        if dict(self._engine.dtypes) != stated:
            raise BackendError(
                f"{folder / record.file} has the tensors {dict(self._engine.dtypes)}",
                expected=f"{stated}, as its record says",
                fix="run promprune-build with --rebuild",
            )

    def _run(self, inputs: Mapping[str, Value], keep: Collection[str]) -> dict[str, DeviceTensor]:
        profile = choose_profile(self._record, {name: tuple(value.shape) for name, value in inputs.items()})
        tensors = {name: self._on_device(value) for name, value in inputs.items()}
        with self._lock:  # the context holds shapes and addresses
            engine = self._engine
            if engine is None:
                raise BackendError(f"{self.name} was closed", fix="load the package again")
            shapes = engine.prepare(profile, {name: tensor.shape for name, tensor in tensors.items()})
            outputs = {name: DeviceArray(self._device, shapes[name], spec.dtype) for name, spec in self.outputs.items()}
            engine.enqueue({name: tensor.address for name, tensor in {**tensors, **outputs}.items()})
        for name, tensor in outputs.items():
            if name not in keep:
                tensor.fetch()
        self._device.synchronize()  # host arrays that were uploaded may change from here on
        return dict(outputs)

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
            self._engine = None


class DeviceArray:
    """A contiguous tensor in device memory, freed with this object; satisfies :class:`DeviceTensor`.

    Args:
        device: where it lies.
        shape: its shape.
        dtype: numpy's name of the element type.
    """

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: str) -> None:
        self.device, self.shape, self.dtype = device, shape, dtype
        self.address = device.allocate(max(self.nbytes, _SMALLEST))
        self._host: Array | None = None
        self._source: Array | None = None  # kept until the copy is surely done
        # At exit the driver frees everything itself, and may be gone before us.
        weakref.finalize(self, device.free, self.address).atexit = False

    @property
    def nbytes(self) -> int:
        """Its size, in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def write(self, array: Array) -> None:
        """Begin to copy a contiguous array of the same shape and dtype here."""
        self._source = array
        if array.nbytes:
            self.device.upload(array, self.address)

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


class CudaDevice:
    """The first CUDA device, through the CUDA bindings for Python. The only code here that needs a driver.

    Raises:
        MissingDependencyError: the CUDA bindings are not installed.
        BackendError: no driver or no device.
    """

    def __init__(self) -> None:
        self._cuda = _import("tensorrt", "cuda.bindings.runtime")
        self._stream = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        # Freed memory stays ours: by default every synchronisation would return it, and every step ask for it again.
        pool, everything = self._call("cudaDeviceGetDefaultMemPool", 0), (1 << 64) - 1
        threshold = _import("tensorrt", "cuda.bindings.driver").cuuint64_t(everything)
        attribute = self._cuda.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
        self._call("cudaMemPoolSetAttribute", pool, attribute, threshold)

    def load(self, plan: bytes, trt: Any) -> DeviceEngine:
        """Load a serialized engine; see :class:`Device`."""
        return _CudaEngine(plan, trt, int(self._stream))

    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory; see :class:`Device`."""
        return int(self._call("cudaMallocAsync", nbytes, self._stream))

    def free(self, address: int) -> None:
        """Free memory in the order of the stream; see :class:`Device`."""
        self._cuda.cudaFreeAsync(address, self._stream)  # what fails here has failed before, and was reported

    def upload(self, array: Array, address: int) -> None:
        """Begin a copy to the device; see :class:`Device`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, address: int, array: Array) -> None:
        """Begin a copy from the device; see :class:`Device`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream; see :class:`Device`."""
        self._call("cudaStreamSynchronize", self._stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        error, *values = getattr(self._cuda, function)(*arguments)
        if int(error) != 0:
            memory = error.name == "cudaErrorMemoryAllocation"
            fix = "use fewer images or tokens at a time, or free memory" if memory else "check the driver (nvidia-smi)"
            raise BackendError(f"{function} failed on the GPU ({error.name})", fix=fix)
        return values[0] if values else None


@functools.cache
def _shared_device() -> CudaDevice:
    """Return the device that all sessions of the process share, so that they can hand each other tensors."""
    return CudaDevice()


class _CudaEngine:
    """An engine loaded by TensorRT; satisfies :class:`DeviceEngine`."""

    def __init__(self, plan: bytes, trt: Any, stream: int) -> None:
        self._log = log_of(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context: Any = None if self._engine is None else self._engine.create_execution_context()
        if self._context is None:
            raise self._error("the engine does not load on this GPU")
        self._stream, self._profile = stream, 0
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        kinds = {name: self._engine.get_tensor_dtype(name).name for name in names}
        self.dtypes = {name: TENSOR_DTYPES.get(kind, kind) for name, kind in kinds.items()}
        self._outputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]

    def prepare(self, profile: int, inputs: Shapes) -> Shapes:
        """Choose a profile and set the input shapes; see :class:`DeviceEngine`."""
        context = self._context
        if profile != self._profile:
            if not context.set_optimization_profile_async(profile, self._stream):
                raise self._error(f"profile {profile} cannot be chosen")
            self._profile = profile
        if not all(context.set_input_shape(name, shape) for name, shape in inputs.items()) or context.infer_shapes():
            raise self._error(f"the engine refuses the shapes {dict(inputs)}")
        return {name: tuple(context.get_tensor_shape(name)) for name in self._outputs}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Run at these addresses; see :class:`DeviceEngine`."""
        for name, address in addresses.items():
            self._context.set_tensor_address(name, address)
        if not self._context.execute_async_v3(self._stream):
            raise self._error("the engine failed while running")

    def _error(self, what: str) -> BackendError:
        reason = trimmed(self._log.errors[-1]) if self._log.errors else "no reason given"
        self._log.errors.clear()
        return BackendError(f"{what} ({reason})", fix="build the engines again on this machine, or use ONNX Runtime")


def _import(extra: EngineBackend, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"running engines needs {error.name}, which is not installed", fix=f"pip install 'promprune[{extra}]'"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"{module} does not load ({' '.join(str(error).split())[:300]})",
            fix=f"pip install --force-reinstall 'promprune[{extra}]'",
        ) from error
