"""Execution backends with one interface.

A backend is one module with a ``open_session(package, graph, config) -> Session`` function, and one row in
``BACKENDS``.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from promprune.package.agree import check_graph
from promprune.package.package import Package
from promprune.runtime.sessions.base import Array, BoundRun, DeviceTensor, RowCopy, Session, Value
from promprune.runtime.sessions.config import BACKENDS, RuntimeConfig

__all__ = ["BACKENDS", "Array", "BoundRun", "DeviceTensor", "RowCopy", "Session", "Value", "open_file", "open_session"]


def open_session(package: Package, graph: str, config: RuntimeConfig) -> Session:
    """Load one graph of a package in the backend of ``config``, and compare it with its record in the manifest.

    Raises:
        PackageError: the graph differs from its record in the manifest.
        BackendError: it, or the provider that was asked for, cannot be loaded.
    """
    session: Session = importlib.import_module(BACKENDS[config.backend]).open_session(package, graph, config)
    record = package.manifest.graphs[graph]
    check_graph(package.graph_file(graph), session.inputs.values(), session.outputs.values(), record)
    return session


def open_file(path: Path, config: RuntimeConfig) -> Session:
    """Load an ONNX file outside of packages, such as a part of a graph, in ONNX Runtime.

    Raises:
        BackendError: it, or the provider that was asked for, cannot be loaded.
    """
    from promprune.runtime.sessions.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(path, config)
