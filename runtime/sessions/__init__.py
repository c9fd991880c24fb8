"""Execution backends behind one interface.

A backend is one module with a ``open_session(path, options) -> Session`` function, and one row in ``BACKENDS``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import MappingProxyType
from typing import Final

from promprune.errors import ConfigError
from promprune.runtime.sessions.base import Array, DeviceTensor, Rows, Session, SessionOptions, TensorSpec, Value

__all__ = [
    "BACKENDS",
    "Array",
    "DeviceTensor",
    "Rows",
    "Session",
    "SessionOptions",
    "TensorSpec",
    "Value",
    "open_session",
]

# Backend -> module; imported when first used, so that a backend that is not used need not be installed.
BACKENDS: Final = MappingProxyType(
    {
        "onnxruntime": "promprune.runtime.sessions.onnxruntime",
        "tensorrt": "promprune.runtime.sessions.tensorrt",  # engines of tensorrt or tensorrt-rtx, whichever were built
    }
)


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
