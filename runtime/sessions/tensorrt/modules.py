"""What the builder and the runtime need of either TensorRT module: its name, its logger, its names of dtypes."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from promprune.dtypes import BY_TENSORRT
from promprune.package.engines import EngineBackend

__all__ = ["ENGINE_MODULES", "dtype_of", "log_of", "trimmed"]

ENGINE_MODULES: Final[Mapping[EngineBackend, str]] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_KEPT_ERRORS: Final = 64


def log_of(trt: Any) -> Any:
    """Return the logger of a TensorRT module, which keeps the latest errors in ``errors`` and says nothing.

    There is one for each module: TensorRT takes only the first logger of a process, and ignores further ones.
    Whoever reports an error clears ``errors`` before the work that may cause it.
    """
    return _make_log(trt.ILogger)


@functools.cache
def _make_log(ILogger: Any) -> Any:
    class Log(ILogger):  # type: ignore[misc]  # the module is chosen at run time
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=_KEPT_ERRORS)

        def log(self, severity: Any, message: str) -> None:
            if severity in (ILogger.INTERNAL_ERROR, ILogger.ERROR):
                self.errors.append(message)

    return Log()


def dtype_of(kind: Any) -> str:
    """Return numpy's name of a TensorRT dtype, or TensorRT's own if no graph has it."""
    return BY_TENSORRT[kind.name].numpy if kind.name in BY_TENSORRT else str(kind.name)


def trimmed(message: object) -> str:
    """Return a message on one line, of an error its own or its name, cut where it becomes long."""
    return (" ".join(str(message).split()) or type(message).__name__)[:300]
