"""The parts of the benchmark that need onnx or PyTorch, which the runtime does not require.

They belong to ``promprune.export``, which imports the runtime; only this table refers in the other direction.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

__all__ = ["PLUGINS", "plugin"]

PLUGINS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "packages": "promprune.export.baselines.export_cache",  # exports the packages of --model
        "pytorch": "promprune.export.baselines.pytorch",  # Hugging Face, and the authors' method
        "work": "promprune.export.roofline.work",  # counts the work of a graph
        "ceilings": "promprune.export.roofline.ceilings",  # measures the ceilings of the device
    }
)


def plugin(name: str) -> Any:
    """Import one of :data:`PLUGINS`.

    Raises:
        ModuleNotFoundError: a package that it needs is not installed.
    """
    return importlib.import_module(PLUGINS[name])
