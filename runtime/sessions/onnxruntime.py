"""ONNX Runtime, on the CPU or on a GPU through one of its execution providers."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnxruntime as ort

from promprune.dtypes import BY_NAME, BY_ONNXRUNTIME
from promprune.errors import BackendError, first_line
from promprune.inputs import read_file
from promprune.package.agree import check_graph
from promprune.package.lowered import LOWERED_FILE, read_lowered
from promprune.package.manifest import DECODER, TensorRecord, WeightsRecord
from promprune.package.package import Package
from promprune.runtime.sessions.base import Array, BoundRun, DeviceTensor, Session, Value
from promprune.runtime.sessions.config import RuntimeConfig, usable_cpus
from promprune.runtime.sessions.interrupt import stoppable
from promprune.runtime.sessions.providers import AUTO, CPU, PROVIDERS, refused, why_not

__all__ = ["Loaded", "OnnxRuntimeSession", "inference_session", "open_lowered_decoder", "open_session", "tensor_record"]

_FATAL: Final = 4  # ORT's highest severity: nothing else is logged, because errors are raised as exceptions
_MAX_GRAPH_BYTES: Final = 2**31  # ONNX's own limit
_WARNING: Final = 2  # ORT's default
_NO_LIBRARIES: Final = "its libraries do not load"
_BFLOAT16: Final = BY_NAME["bf16"].onnx  # ORT has no numpy dtype for it


def open_lowered_decoder(package: Package, config: RuntimeConfig) -> OnnxRuntimeSession | None:
    """Load the lowered decoder of a package, on the CPU; None if the package has none.

    Raises:
        PackageError: it is stale or damaged.
        BackendError: it cannot be loaded.
    """
    lowered = read_lowered(package, tool_version=ort.__version__)
    if lowered is None:
        return None
    file = package.folder / lowered.graph.file
    session = OnnxRuntimeSession(file, replace(config, provider=CPU), weights=package.graph_file(DECODER).parent)
    check_graph(file, session.inputs.values(), session.outputs.values(), lowered.graph, source=LOWERED_FILE)
    session.notes += _notes_on_weights(package.manifest.weights, DECODER, config)
    return session


def open_session(package: Package, graph: str, config: RuntimeConfig) -> OnnxRuntimeSession:
    """Load one graph of a package; engines that a provider builds are stored in the package.

    Raises:
        BackendError: ORT cannot run the file, or the requested provider cannot be loaded.
    """
    weights = package.manifest.weights
    session = OnnxRuntimeSession(
        package.graph_file(graph),
        config,
        engines=package.folder / "engines",
        expand_weights=weights is not None and weights.expands_on_cpu(graph),
    )
    session.notes += _notes_on_weights(weights, graph, config)
    return session


class OnnxRuntimeSession(Session):
    """An ONNX graph in ONNX Runtime.

    Args:
        path: the ``.onnx`` file.
        config: provider and threads. With ``"auto"``, ``device`` tells which provider was loaded.
        engines: folder where a provider may store engines; None to store none.
        weights: folder of the external weights; None if they are in the folder of the file.
        expand_weights: as in :func:`inference_session`.

    Raises:
        BackendError: the graph, or the requested provider, cannot be loaded.
    """

    def __init__(
        self,
        path: Path,
        config: RuntimeConfig,
        *,
        engines: Path | None = None,
        weights: Path | None = None,
        expand_weights: bool = False,
    ) -> None:
        self.name = path.name
        model = path if weights is None else _read_graph(path)  # given a file, ORT looks for weights in its folder only
        loaded = inference_session(
            model, config, name=str(path), engines=engines, weights=weights, expand_weights=expand_weights
        )
        self._session: ort.InferenceSession | None = loaded.session
        self.device, self.notes = PROVIDERS[loaded.provider].device, loaded.notes
        self.inputs = {node.name: tensor_record(node, path) for node in self._session.get_inputs()}
        self.outputs = {node.name: tensor_record(node, path) for node in self._session.get_outputs()}

    def bind_buffers(self, buffers: Mapping[str, Array], updated: Mapping[str, str]) -> BoundRun:
        """Bind each buffer once, as an input and as an output: a run neither copies nor binds them."""
        values = {name: _ort_value(buffer) for name, buffer in buffers.items()}
        binding = self._open().io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for output, name in updated.items():
            binding.bind_ortvalue_output(output, values[name])
        others = [name for name in self.outputs if name not in updated]

        def run(inputs: Mapping[str, Value]) -> dict[str, DeviceTensor]:
            self._begin(inputs, bound=values)
            return self._run_binding(binding, inputs, dict.fromkeys(others, CPU), first=len(updated))

        return run

    def _run(self, inputs: Mapping[str, Value], keep: Collection[str]) -> dict[str, DeviceTensor]:
        devices = {name: self.device.lower() if name in keep else CPU for name in self.outputs}
        return self._run_binding(self._open().io_binding(), inputs, devices)

    def _run_binding(
        self, binding: ort.IOBinding, inputs: Mapping[str, Value], devices: Mapping[str, str], first: int = 0
    ) -> dict[str, DeviceTensor]:
        """Run with further inputs, and with outputs on the devices given; ``first`` outputs are bound already."""
        session = self._open()
        try:
            for name, value in inputs.items():
                binding.bind_ortvalue_input(name, _ort_value(value))
            for name, device in devices.items():
                binding.bind_output(name, device)
            options = ort.RunOptions()
            with stoppable(partial(setattr, options, "terminate", True)):
                session.run_with_iobinding(binding, options)
            values = binding.get_outputs()[first:]
        except Exception as error:  # ORT raises RuntimeErrors and its own types, without a common base class
            raise _failure(f"{self.name} failed while running", error) from error
        return {name: _OrtTensor(value) for name, value in zip(devices, values, strict=True)}

    def _open(self) -> ort.InferenceSession:
        if self._session is None:
            raise BackendError(f"{self.name} was closed", fix="load the package again")
        return self._session

    def close(self) -> None:
        """Free the graph; running it afterwards is a BackendError."""
        self._session = None


class _OrtTensor:
    """A tensor held by ORT; satisfies :class:`DeviceTensor`."""

    def __init__(self, value: ort.OrtValue) -> None:
        self.value = value
        self.shape = tuple(value.shape())
        self.dtype = BY_ONNXRUNTIME[value.data_type()].numpy

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def numpy(self) -> Array:
        array: Array = _bfloat16_array(self.value) if self.dtype == "bfloat16" else self.value.numpy()
        return array


def _bfloat16_array(value: ort.OrtValue) -> Array:
    """Return a copy of a value's content; ORT itself cannot return arrays of this dtype."""
    if value.device_name().lower() != CPU:
        here = ort.OrtValue.ortvalue_from_shape_and_type(value.shape(), _BFLOAT16, CPU)
        ort.copy_tensors([value], [here])
        value = here
    array = np.empty(value.shape(), "bfloat16")
    ctypes.memmove(array.ctypes.data, value.data_ptr(), array.nbytes)
    return array


def _ort_value(value: Value) -> ort.OrtValue:
    if isinstance(value, _OrtTensor):
        return value.value
    array = np.ascontiguousarray(value if isinstance(value, np.ndarray) else value.numpy())
    if array.dtype.name == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)


class Loaded(NamedTuple):
    """A session of ONNX Runtime, the provider that was loaded, and why (one line per provider)."""

    session: ort.InferenceSession
    provider: str
    notes: tuple[str, ...]


def inference_session(
    model: Path | bytes,
    config: RuntimeConfig,
    *,
    name: str = "the graph",
    weights: Path | None = None,
    engines: Path | None = None,
    low_memory: bool = False,
    expand_weights: bool = False,
) -> Loaded:
    """Load a graph with the requested provider, or with the first one that loads.

    Args:
        model: an ``.onnx`` file, or the content of one.
        config: provider and threads.
        name: name of the graph for messages, if ``model`` is not a file.
        weights: folder of the external weights, if ``model`` is not a file.
        engines: folder where a provider may store engines; None to store none.
        low_memory: make no copies of weights in advance and keep no freed memory, which is slower.
        expand_weights: on the CPU, convert quantized weights to floating point once, when the graph is loaded.

    Raises:
        BackendError: the graph, or the requested provider, cannot be loaded.
    """
    if isinstance(model, Path):
        name = str(model)
        if not model.is_file():
            raise BackendError(f"{model} does not exist", fix="copy the package again, or export it again")
    settings = _settings(config, weights, low_memory=low_memory)
    obstacles: dict[str, str] = {}
    for provider in _candidates(config.provider):
        if expand_weights and provider == CPU:
            settings.add_session_config_entry("session.disable_quant_qdq", "1")
        try:
            session, obstacle = _load(model, settings, provider, engines)
        except Exception as error:  # as above: no common tree
            if provider == CPU or config.provider != AUTO:
                before = "".join(f"; not {other}: {reason}" for other, reason in obstacles.items())
                raise _failure(f"{name} cannot be loaded by ONNX Runtime", error, before) from error
            session, obstacle = None, first_line(error)
        if session is not None:
            return Loaded(session, provider, _notes(provider, config.provider, obstacles))
        obstacles[provider] = obstacle
    raise refused(config.provider, obstacles[config.provider])


def _settings(config: RuntimeConfig, weights: Path | None, *, low_memory: bool) -> ort.SessionOptions:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = config.num_threads or usable_cpus()
    # Threads that spin between operators slow down other processes, and other sessions of this one.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(config.accuracy_level))
    settings.log_severity_level = _FATAL
    if weights is not None:
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", os.fspath(weights))
    if low_memory:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.enable_cpu_mem_arena = False
        settings.enable_mem_pattern = False
        settings.add_session_config_entry("session.disable_prepacking", "1")
    return settings


def _candidates(provider: str) -> list[str]:
    return [name for name in PROVIDERS if PROVIDERS[name].automatic] if provider == AUTO else [provider]


def _notes(chosen: str, asked: str, obstacles: Mapping[str, str]) -> tuple[str, ...]:
    """Explain which provider was chosen, and why none of the others, in one line each."""
    asked_for = "asked for" if asked != AUTO else "the first that loads"
    notes = [f"provider {chosen}: {asked_for}"]
    for name in PROVIDERS:
        if name != chosen:
            reason = obstacles.get(name) or why_not(name) or "not asked for"
            notes.append(f"not {name}: {reason}")
    return tuple(notes)


def _load(
    model: Path | bytes, settings: ort.SessionOptions, provider: str, engines: Path | None
) -> tuple[ort.InferenceSession | None, str]:
    """Load with one provider and its fallbacks; return None and the reason if the provider is not available."""
    if reason := why_not(provider):
        return None, reason
    names = [provider, *PROVIDERS[provider].falls_back_to]
    wanted = [(PROVIDERS[name].ort_name, PROVIDERS[name].options(engines)) for name in names]
    source = os.fspath(model) if isinstance(model, Path) else model
    try:
        with _quiet() if provider != CPU else contextlib.nullcontext():
            session = ort.InferenceSession(source, settings, providers=wanted, enable_fallback=0)
    except Exception as error:  # as above: no common tree
        if provider != CPU and "please install" in str(error).lower():
            return None, _NO_LIBRARIES
        raise
    got = PROVIDERS[provider].ort_name in session.get_providers()
    return (session, "") if got else (None, _NO_LIBRARIES)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Load CUDA's libraries, and suppress ORT's error messages if they do not load."""
    ort.set_default_logger_severity(_FATAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(OSError, RuntimeError):
            ort.preload_dlls()  # prints the libraries that it does not find
        yield
    finally:
        ort.set_default_logger_severity(_WARNING)


def tensor_record(node: Any, path: Path) -> TensorRecord:
    """Return ONNX Runtime's description of an input or output as a record, with numpy's name of its dtype.

    Raises:
        BackendError: its dtype is not supported.
    """
    if node.type not in BY_ONNXRUNTIME:
        raise BackendError(
            f"{path} has {node.name} of type {node.type}",
            expected=f"one of {', '.join(dtype.numpy for dtype in BY_ONNXRUNTIME.values())}",
            fix="export with --dtype fp32 or --dtype fp16",
        )
    shape = tuple(size if isinstance(size, int) else str(size) for size in node.shape)
    return TensorRecord(name=node.name, dtype=BY_ONNXRUNTIME[node.type].numpy, shape=shape)


def _read_graph(path: Path) -> bytes:
    try:
        return read_file(path, most_bytes=_MAX_GRAPH_BYTES)
    except OSError as error:
        raise BackendError(f"{path} cannot be read ({error.strerror})") from error


def _failure(what: str, error: Exception, before: str = "") -> BackendError:
    if isinstance(error, BackendError):
        return error
    return BackendError(f"{what} ({first_line(error)}{before})", fix=_hint(str(error)))


def _hint(text: str) -> str:
    lowered = text.lower()
    if "not_implemented" in lowered:
        return "use a GPU for it, or export with --dtype fp32: this provider lacks an operator in that dtype"
    if "memory" in lowered or "bad_alloc" in lowered or "bad allocation" in lowered:
        return "use fewer images or tokens at a time, or free memory"
    return "check the package with --check-weights, or export it again"


def _notes_on_weights(weights: WeightsRecord | None, graph: str, config: RuntimeConfig) -> tuple[str, ...]:
    """Explain how ONNX Runtime multiplies by the quantized weights of a graph, in one line."""
    if weights is None or not weights.of(graph).is_quantized:
        return ()
    if weights.of(graph).int8_activations:
        return (f"{graph}: activations are rounded to int8",)
    if weights.expands_on_cpu(graph):
        return (f"{graph}: on a CPU, quantized weights are converted to floating point when the graph is loaded",)
    exact = "exactly" if config.accuracy_level == 0 else f"at accuracy level {config.accuracy_level}"
    return (f"{graph}: quantized weights are multiplied {exact}",)
