"""PromPrune's visual-token selection: the method, the exported package, settings and errors.

``promprune.export`` writes packages, ``promprune.runtime`` runs them. Names that need PyTorch are imported on first
use::

    import promprune

    pruned = promprune.prune_tokens(image_features, saliency, keep_tokens=69)
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from promprune._version import __version__
from promprune.errors import PrompruneError
from promprune.method.config import SelectionConfig

if TYPE_CHECKING:
    from promprune.method.batched import PrunedTokens, prune_tokens
    from promprune.method.reference import Selection, select_tokens

# ONNX Runtime reads this when it is imported; otherwise it stores an identifier of the machine in the user's home
# folder, and sends events about the models that it runs to its vendor.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "PrompruneError",
    "PrunedTokens",
    "Selection",
    "SelectionConfig",
    "__version__",
    "prune_tokens",
    "select_tokens",
]

_HOME = {
    "PrunedTokens": "promprune.method.batched",
    "Selection": "promprune.method.reference",
    "prune_tokens": "promprune.method.batched",
    "select_tokens": "promprune.method.reference",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
