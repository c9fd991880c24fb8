"""The backends that can be compared: one table."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort
import polygraphy.config
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx.helper import tensor_dtype_to_np_dtype
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata

from promprune.errors import BackendError
from promprune.export.engine import engine_from_onnx, load_toolkit
from promprune.package.engines import CURRENT, EngineBackend, EngineConfig, ProfileRecord
from promprune.runtime.sessions.providers import PROVIDERS, refused, why_not
from promprune.runtime.sessions.tensorrt.modules import trimmed

__all__ = ["RUNNERS", "RunnerMaker", "Subject", "failure"]


class Pad(OpRun):
    """Pad with a constant; negative widths cut off, as the standard says and onnx's own evaluator does not."""

    op_domain = ""

    def _run(self, data: Any, pads: Any, value: Any = None, axes: Any = None, mode: str = "constant") -> tuple[Any]:
        if mode != "constant" or axes is not None:
            raise NotImplementedError(f"Pad with mode {mode!r} and axes {axes}")
        before, after = np.asarray(pads).reshape(2, -1)
        kept = tuple(slice(max(-b, 0), n - max(-a, 0)) for b, a, n in zip(before, after, data.shape, strict=True))
        widths = list(zip(before.clip(0), after.clip(0), strict=True))
        fill = 0 if value is None else np.asarray(value).item()
        return (np.pad(data[kept], widths, constant_values=fill),)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A graph to be run.

    Attributes:
        file: the ONNX file, beside links to its weights.
        folder: where the weights themselves are.
        profile: the shapes of the inputs.
    """

    file: Path
    folder: Path
    profile: ProfileRecord


# Makes a runner of a graph, under a name.
RunnerMaker = Callable[[str, Subject], BaseRunner]

_SHOWN: Final = 3  # lines of an error that are reported


def _onnxruntime(provider: str) -> RunnerMaker:
    def make(name: str, subject: Subject) -> BaseRunner:
        reason = why_not(provider)
        if reason is not None:
            raise refused(provider, reason)
        return OnnxrtRunner(partial(_session, provider, subject), name=name)

    return make


def _session(provider: str, subject: Subject) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    # ONNX Runtime does not follow links; a graph from memory may have its weights anywhere.
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(subject.folder))
    settings.log_severity_level = 4  # fatal; errors come as exceptions
    names = [provider, *PROVIDERS[provider].falls_back_to]
    providers: list[Any] = [(PROVIDERS[name].ort_name, PROVIDERS[name].options(subject.file)) for name in names]
    session = ort.InferenceSession(subject.file.read_bytes(), settings, providers=providers)
    if PROVIDERS[provider].ort_name not in session.get_providers():
        raise refused(provider, "its libraries do not load")
    return session


class _ReferenceRunner(BaseRunner):
    """Runs a graph in onnx's own evaluator: numpy, operator by operator, and slow."""

    def __init__(self, name: str, subject: Subject) -> None:
        super().__init__(name=name)
        self._subject = subject

    def activate_impl(self) -> None:
        model = onnx.load(self._subject.file, load_external_data=False)
        _load_weights(model, self._subject.file.parent)
        _give_loops_a_condition(model)
        self._evaluator = ReferenceEvaluator(model, new_ops=[Pad])

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for info in self._evaluator.proto_.graph.input:
            tensor = info.type.tensor_type
            shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
            metadata.add(info.name, dtype=tensor_dtype_to_np_dtype(tensor.elem_type), shape=shape)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> dict[str, Any]:
        outputs = self._evaluator.run(None, dict(feed_dict))
        self.inference_time = 0.0  # of no meaning here
        return dict(zip(self._evaluator.output_names, outputs, strict=True))

    def deactivate_impl(self) -> None:
        del self._evaluator


def _load_weights(model: onnx.ModelProto, folder: Path) -> None:
    """Read the weights of a graph into it, from files in a folder; onnx itself refuses every kind of link."""
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            info = ExternalDataInfo(tensor)
            with (folder / Path(info.location).name).open("rb") as stream:
                stream.seek(info.offset or 0)
                tensor.raw_data = stream.read(info.length)
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]


def _give_loops_a_condition(model: onnx.ModelProto) -> None:
    """Onnx's own evaluator never runs a Loop that has a trip count alone, which the standard allows."""
    name = "always"
    for node in model.graph.node:
        if node.op_type == "Loop" and not node.input[1]:
            node.input[1] = name
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), name))


def _tensorrt(backend: EngineBackend) -> RunnerMaker:
    def make(name: str, subject: Subject) -> BaseRunner:
        """Build an engine for this machine's GPU, with the settings of every engine of this project, and run it."""
        toolkit = load_toolkit(backend)
        target = toolkit.resolve(CURRENT)
        # Polygraphy looks for this once, when its TensorRT backend is first imported.
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(backend == "tensorrt-rtx"))
        polygraphy.config.USE_TENSORRT_RTX = backend == "tensorrt-rtx"
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        config = EngineConfig(backend=backend)
        plan = engine_from_onnx(toolkit, subject.file, None, profiles=(subject.profile,), target=target, config=config)
        return TrtRunner(EngineFromBytes(bytes(memoryview(plan))), name=name)

    return make


RUNNERS: Final[Mapping[str, RunnerMaker]] = MappingProxyType(
    {
        "onnxruntime": _onnxruntime("cpu"),
        "onnxruntime-cuda": _onnxruntime("cuda"),
        "onnx-reference": _ReferenceRunner,
        "tensorrt": _tensorrt("tensorrt"),
        "tensorrt-rtx": _tensorrt("tensorrt-rtx"),
    }
)


def failure(path: Path, error: Exception) -> BackendError:
    """Return what a backend said, on one line."""
    lines = [line for line in str(error).splitlines() if line.strip()][:_SHOWN]
    return BackendError(f"{path.name} cannot be compared ({trimmed(' '.join(lines) or error)})")
