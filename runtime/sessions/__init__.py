"""Execution backends behind one interface.

A backend is one module with a ``open_session(path, options) -> Session`` function, and one row in ``BACKENDS``.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from promprune.errors import ConfigError
from promprune.package.manifest import Manifest
from promprune.runtime.sessions.base import Array, DeviceTensor, Rows, Session, SessionOptions, TensorSpec, Value
from promprune.runtime.sessions.config import BACKENDS, RuntimeConfig

__all__ = [
    "BACKENDS",
    "Array",
    "DeviceTensor",
    "Rows",
    "Session",
    "SessionOptions",
    "TensorSpec",
    "Value",
    "open_graph",
    "open_session",
]


def open_session(path: Path, options: SessionOptions, *, backend: str = "onnxruntime") -> Session:
    """Load one graph.

    Raises:
        ConfigError: no such backend.
        BackendError: the backend, or the graph in it, cannot be loaded.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"received backend {backend!r}", expected=f"one of {', '.join(BACKENDS)}")
    session: Session = importlib.import_module(BACKENDS[backend]).open_session(path, options)
    return session


def open_graph(folder: Path, manifest: Manifest, name: str, config: RuntimeConfig) -> Session:
    """Load one graph of a package, and compare it with its record in the manifest.

    Raises:
        PackageError: it is not what the manifest says.
        BackendError: it, or the provider that was asked for, cannot be loaded.
    """
    record = manifest.graphs[name]
    options = SessionOptions(
        provider=config.provider,
        num_threads=config.num_threads,
        cuda_graphs=config.cuda_graphs,
    )
    session = open_session(folder / record.file, options, backend=config.backend)
    session.check_against(record, folder / record.file)
    return session
