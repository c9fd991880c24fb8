"""The first CUDA device, and engines on it, through NVIDIA's Python modules: the only module that needs a driver."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from promprune.errors import BackendError
from promprune.files import replace_file
from promprune.package.manifest import TensorRecord
from promprune.runtime.sessions.base import Array
from promprune.runtime.sessions.tensorrt.device import DeviceEngine, DeviceGraph, Pitched, Shapes
from promprune.runtime.sessions.tensorrt.modules import import_module, log_of, tensor_record, trimmed

__all__ = ["CudaDevice"]


class CudaDevice:
    """The first CUDA device; satisfies :class:`promprune.runtime.sessions.tensorrt.device.Device`.

    Raises:
        MissingDependencyError: the CUDA bindings are not installed.
        BackendError: there is no driver, it is too old, or there is no device.
    """

    def __init__(self) -> None:
        self._cuda = import_module("tensorrt", "cuda.bindings.runtime")
        self._stream = self.call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        # Keep freed memory: by default every synchronisation would return it, and every step would allocate it again.
        pool, everything = self.call("cudaDeviceGetDefaultMemPool", 0), (1 << 64) - 1
        threshold = import_module("tensorrt", "cuda.bindings.driver").cuuint64_t(everything)
        attribute = self._cuda.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold
        self.call("cudaMemPoolSetAttribute", pool, attribute, threshold)

    @property
    def stream(self) -> int:
        """The address of the stream."""
        return int(self._stream)

    def load(self, plan: bytes, trt: Any, runtime_cache: Path) -> DeviceEngine:
        """Load a serialized engine; see :class:`Device`."""
        return _CudaEngine(plan, trt, self, runtime_cache)

    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory; see :class:`Device`."""
        return int(self.call("cudaMallocAsync", nbytes, self._stream))

    def free(self, address: int) -> None:
        """Free memory in the order of the stream; see :class:`Device`."""
        self._cuda.cudaFreeAsync(address, self._stream)  # an error here was caused and reported earlier

    def upload(self, array: Array, address: int) -> None:
        """Begin a copy to the device; see :class:`Device`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self._stream)

    def download(self, address: int, array: Array) -> None:
        """Begin a copy from the device; see :class:`Device`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self._stream)

    def clear(self, address: int, nbytes: int) -> None:
        """Begin to fill memory with zeros; see :class:`Device`."""
        self.call("cudaMemsetAsync", address, 0, nbytes, self._stream)

    def copy(self, source: Pitched, target: Pitched, width: int, height: int) -> None:
        """Begin a copy on the device; see :class:`Device`."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpy2DAsync", *target, *source, width, height, kind, self._stream)

    def synchronize(self) -> None:
        """Wait for the stream; see :class:`Device`."""
        self.call("cudaStreamSynchronize", self._stream)

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime, and return its result, if it has one.

        Raises:
            BackendError: the call fails; the message names the function and CUDA's error.
        """
        error, *values = getattr(self._cuda, function)(*arguments)
        if int(error) != 0:
            raise BackendError(f"{function} failed on the GPU ({error.name})", fix=_fix(error.name))
        return values[0] if values else None

    def graph_of(self, run: Any) -> _CudaGraph:
        """Record what ``run(stream)`` enqueues, on a separate stream: other threads use that of the device.

        Raises:
            BackendError: ``run`` fails, or cannot be recorded.
        """
        recording = self.call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        try:
            graph = self._capture_graph(recording, run)
            try:
                executable = self.call("cudaGraphInstantiate", graph, 0)
            finally:
                self._cuda.cudaGraphDestroy(graph)
            launch = functools.partial(self.call, "cudaGraphLaunch", executable, self._stream)
            return _CudaGraph(self._cuda, launch, executable)
        finally:
            self._cuda.cudaStreamDestroy(recording)

    def _capture_graph(self, recording: Any, run: Any) -> Any:
        """Return the graph of what ``run`` enqueues on a stream; if that fails, end the recording and discard it."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.call("cudaStreamBeginCapture", recording, mode)
        try:
            run(int(recording))
        except BaseException:
            error, *graph = self._cuda.cudaStreamEndCapture(recording)  # usually fails too, with a less specific error
            if int(error) == 0:
                self._cuda.cudaGraphDestroy(*graph)
            raise
        return self.call("cudaStreamEndCapture", recording)


class _CudaGraph:
    """A recorded run; satisfies :class:`DeviceGraph`."""

    def __init__(self, cuda: Any, launch: Callable[[], None], executable: Any) -> None:
        self.launch = launch
        weakref.finalize(self, cuda.cudaGraphExecDestroy, executable).atexit = False


class _CudaEngine:
    """An engine loaded by TensorRT; satisfies :class:`DeviceEngine`."""

    def __init__(self, plan: bytes, trt: Any, device: CudaDevice, runtime_cache: Path) -> None:
        self._trt, self._device, self._log = trt, device, log_of(trt)
        self._log.errors.clear()
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self.error("the engine does not load on this GPU")
        self._cache_file = runtime_cache
        self._cache = self._runtime_cache() if hasattr(trt, "IRuntimeCache") else None
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self.inputs, self.outputs = (
            tuple(self._tensor(name) for name in names if self._engine.get_tensor_mode(name) == mode)
            for mode in (trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT)
        )
        self._scratch_bytes = max(int(self._engine.device_memory_size_v2), 1)
        self._scratch = device.allocate(self._scratch_bytes)
        weakref.finalize(self, device.free, self._scratch).atexit = False

    def context(self, *, recorded: bool = False) -> _CudaContext:
        """Return a new execution context; see :class:`DeviceEngine`."""
        settings = managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._cache is not None:  # TensorRT for RTX records runs itself
            settings = self._engine.create_runtime_config()
            settings.set_runtime_cache(self._cache)
            settings.set_execution_context_allocation_strategy(managed)
            if recorded:
                settings.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        context = self._engine.create_execution_context(settings)
        if context is None:
            raise self.error("the engine does not load on this GPU")
        context.set_device_memory(self._scratch, self._scratch_bytes)
        return _CudaContext(self, context, self._trt, self._device)

    @property
    def records_itself(self) -> bool:
        """Whether TensorRT itself records repeated runs."""
        return self._cache is not None

    def _tensor(self, name: str) -> TensorRecord:
        return tensor_record(name, self._engine.get_tensor_dtype(name), self._engine.get_tensor_shape(name))

    def _runtime_cache(self) -> Any:
        """Return a cache with the kernels that TensorRT for RTX compiled earlier, if there are any."""
        cache = self._engine.create_runtime_config().create_runtime_cache()
        with contextlib.suppress(OSError):
            cache.deserialize(self._cache_file.read_bytes())  # if it is from another device, the cache stays empty
        return cache

    def close(self) -> None:
        """Save the compiled kernels next to the engine, if that is writable; see :class:`DeviceEngine`."""
        content = b"" if self._cache is None else bytes(memoryview(self._cache.serialize()))
        with contextlib.suppress(OSError):
            if content:
                replace_file(self._cache_file, content)

    def error(self, what: str) -> BackendError:
        """Return an error with TensorRT's reason."""
        reason = trimmed(self._log.errors[-1]) if self._log.errors else "no reason given"
        self._log.errors.clear()
        if "driver version is insufficient" in reason.lower():
            return BackendError(f"{what} ({reason})", fix=_fix("cudaErrorInsufficientDriver"))
        return BackendError(f"{what} ({reason})", fix="build the engines again on this machine, or use ONNX Runtime")


class _CudaContext:
    """An execution context of TensorRT; satisfies :class:`DeviceContext`."""

    def __init__(self, engine: _CudaEngine, context: Any, trt: Any, device: CudaDevice) -> None:
        self._engine, self._context, self._trt, self._device = engine, context, trt, device
        self._stream, self._profile = device.stream, -1

    def prepare(self, profile: int, inputs: Shapes) -> Shapes:
        """Choose a profile and set the input shapes; see :class:`DeviceContext`."""
        context = self._context
        if profile != self._profile:
            if not context.set_optimization_profile_async(profile, self._stream):
                raise self._engine.error(f"profile {profile} cannot be chosen")
            self._profile = profile
        if not all(context.set_input_shape(name, shape) for name, shape in inputs.items()) or context.infer_shapes():
            raise self._engine.error(f"the engine refuses the shapes {dict(inputs)}")
        return {tensor.name: tuple(context.get_tensor_shape(tensor.name)) for tensor in self._engine.outputs}

    def enqueue(self, addresses: Mapping[str, int]) -> None:
        """Run at these addresses; see :class:`DeviceContext`."""
        for name, address in addresses.items():
            self._context.set_tensor_address(name, address)
        self._execute(self._stream)

    def capture(self, addresses: Mapping[str, int]) -> DeviceGraph | None:
        """Record a run at these addresses; see :class:`DeviceContext`."""
        if self._engine.records_itself:
            return None
        for name, address in addresses.items():
            self._context.set_tensor_address(name, address)
        return self._device.graph_of(self._execute)

    def layer_times(self, addresses: Mapping[str, int]) -> list[tuple[str, float]]:
        """Run once under TensorRT's profiler; see :class:`DeviceContext`."""
        times: list[tuple[str, float]] = []

        class Profiler(self._trt.IProfiler):  # type: ignore[misc, name-defined]  # the module is chosen at run time
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times.append((layer_name, ms))

        self._profiler = self._context.profiler = Profiler()  # the context holds no reference
        self._context.enqueue_emits_profile = True
        try:
            self.enqueue(addresses)
            self._device.synchronize()
        finally:
            self._context.enqueue_emits_profile = False
        return times

    def _execute(self, stream: int) -> None:
        if not self._context.execute_async_v3(stream):
            raise self._engine.error("the engine failed while running")


def _fix(error: str) -> str:
    """Return how to fix one of CUDA's errors."""
    fixes = {
        "cudaErrorMemoryAllocation": "use fewer images or tokens at a time, or free memory",
        "cudaErrorInsufficientDriver": "install or update the NVIDIA driver: it is missing, or older than this CUDA",
        "cudaErrorNoDevice": "use a machine with an NVIDIA GPU, or ONNX Runtime",
    }
    return fixes.get(error, "check the driver (nvidia-smi)")
