"""What both the builder and the runtime need of the TensorRT modules: names, loggers, dtypes."""

from __future__ import annotations

import functools
import importlib
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from promprune.dtypes import BY_TENSORRT
from promprune.errors import BackendError, MissingDependencyError
from promprune.package.agree import UNKNOWN
from promprune.package.engines import EngineBackend
from promprune.package.manifest import TensorRecord

__all__ = ["import_module", "load_tensorrt", "log_of", "tensor_record", "trimmed"]

_MODULES: Final[Mapping[EngineBackend, str]] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_KEPT_ERRORS: Final = 64


def load_tensorrt(backend: EngineBackend) -> Any:
    """Import the Python module of a backend; errors are those of :func:`import_module`."""
    return import_module(backend, _MODULES[backend])


def import_module(extra: EngineBackend, module: str) -> Any:
    """Import one of NVIDIA's modules.

    Args:
        extra: extra of this project that installs it.
        module: its name.

    Raises:
        MissingDependencyError: it is not installed.
        BackendError: it is installed, but does not load.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"engines need {error.name}, which is not installed", fix=f"pip install 'promprune[{extra}]'"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"{module} is installed but does not load ({trimmed(error)})",
            fix=f"pip install --force-reinstall 'promprune[{extra}]'",
        ) from error


def log_of(trt: Any) -> Any:
    """Return the logger of a TensorRT module, which collects the latest errors in ``errors`` and prints nothing.

    There is one per module, because TensorRT uses only the first logger of a process and ignores others. Callers
    clear ``errors`` before the work whose errors they report.
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


def tensor_record(name: str, dtype: Any, dims: Any) -> TensorRecord:
    """Return a tensor of a network or engine as a record; dtypes outside the table keep TensorRT's name."""
    found = BY_TENSORRT.get(dtype.name)
    shape = tuple(UNKNOWN if size < 0 else int(size) for size in dims)
    return TensorRecord(name=name, dtype=found.numpy if found else dtype.name, shape=shape)


def trimmed(message: object) -> str:
    """Return a message on one line, truncated if it is long; for an exception its message, or else its class name."""
    return (" ".join(str(message).split()) or type(message).__name__)[:300]
