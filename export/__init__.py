"""Exporting: from a Hugging Face checkpoint to a package. Needs ``promprune[export]``; the runtime does not.

Everything is imported on first use, so that a wrong option is refused before PyTorch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from promprune.export.config import ExportConfig
    from promprune.export.graphs.selector import build_selector
    from promprune.export.pipeline import ExportResult, export_package
    from promprune.export.verify.verification import verify_package

__all__ = ["ExportConfig", "ExportResult", "build_selector", "export_package", "verify_package"]

_HOME = {
    "ExportConfig": "promprune.export.config",
    "ExportResult": "promprune.export.pipeline",
    "build_selector": "promprune.export.graphs.selector",
    "export_package": "promprune.export.pipeline",
    "verify_package": "promprune.export.verify.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
