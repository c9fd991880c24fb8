"""The table of backends that can be compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final

import onnxruntime as ort
import polygraphy.config
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner

from promprune.errors import BackendError
from promprune.export.engine import engine_from_onnx, load_toolkit
from promprune.package.engines import CURRENT, EngineBackend, EngineConfig, ProfileRecord
from promprune.runtime.sessions.config import Provider, RuntimeConfig
from promprune.runtime.sessions.onnxruntime import inference_session
from promprune.runtime.sessions.tensorrt.modules import trimmed

__all__ = ["RUNNERS", "GraphToRun", "RunnerMaker", "failure"]


@dataclass(frozen=True, kw_only=True)
class GraphToRun:
    """A graph to run.

    Attributes:
        file: the ONNX file, in a folder with links to its weights.
        folder: the folder of the weights themselves.
        profile: the shapes of the inputs.
    """

    file: Path
    folder: Path
    profile: ProfileRecord


# Makes a runner of a graph, under a name.
RunnerMaker = Callable[[str, GraphToRun], BaseRunner]

_MAX_ERROR_LINES: Final = 3  # number of reported lines of an error


def _onnxruntime(provider: Provider) -> RunnerMaker:
    def make(name: str, subject: GraphToRun) -> BaseRunner:
        return OnnxrtRunner(partial(_session, provider, subject), name=name)

    return make


def _session(provider: Provider, subject: GraphToRun) -> ort.InferenceSession:
    # ONNX Runtime does not follow links; a graph that is passed as bytes may have its weights in any folder.
    content, config = subject.file.read_bytes(), RuntimeConfig(provider=provider)
    return inference_session(content, config, name=subject.file.name, weights=subject.folder).session


def _tensorrt(backend: EngineBackend) -> RunnerMaker:
    def make(name: str, subject: GraphToRun) -> BaseRunner:
        """Make a runner that builds an engine for this machine's GPU, with the settings of ``promprune-build``."""
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
        "tensorrt": _tensorrt("tensorrt"),
        "tensorrt-rtx": _tensorrt("tensorrt-rtx"),
    }
)


def failure(path: Path, error: Exception) -> BackendError:
    """Return a backend's error on one line."""
    lines = [line for line in str(error).splitlines() if line.strip()][:_MAX_ERROR_LINES]
    return BackendError(f"{path.name} cannot be compared ({trimmed(' '.join(lines) or error)})")
