"""Structured logs: one JSON object per line on stderr; never prompts, answers or images."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any, Final

__all__ = ["configure_logs", "log_event", "log_failure"]

_LOGGER: Final = logging.getLogger("promprune.server")


class _JsonLines(logging.Formatter):
    """One JSON object per record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        content = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        return json.dumps(content)


def configure_logs() -> None:
    """Write the logs of the server, and the warnings of its HTTP library, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    for name, level in (("promprune.server", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def log_event(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Write one line."""
    _LOGGER.log(level, event, extra={"fields": fields})


def log_failure(error: BaseException) -> None:
    """Write where an unexpected error was raised; not its message, which could quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames]
    log_event("failure", logging.ERROR, error=type(error).__name__, traceback=places)
