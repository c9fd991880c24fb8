"""What a stage found, in a JSON file that is whole at every moment."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from promprune.errors import one_line
from promprune.files import replace_file

__all__ = ["Record", "describe_error", "read_record", "write_json"]

LINE_LENGTH = 300


class Record:
    """The rows of one stage. The file is replaced whole after each of them, so a killed stage leaves its rows.

    Args:
        path: the JSON file.
        stage: name of the stage.
    """

    def __init__(self, path: Path, stage: str) -> None:
        self._path = path
        self._start = time.monotonic()
        self._content: dict[str, Any] = {"stage": stage, "status": "running", "error": None, "facts": {}, "rows": []}
        self._write()

    def fact(self, name: str, value: Any) -> None:
        """Add one figure or statement by name; units stand at the end of the name."""
        self._content["facts"][name] = value
        self._write()

    def row(self, **figures: Any) -> None:
        """Add one row of a table."""
        self._content["rows"].append(figures)
        self._write()

    def attempt(self, measure: Callable[[], dict[str, Any]], **labels: Any) -> None:
        """Add a row of ``labels`` and of what ``measure`` returns, or of the error it fails with."""
        try:
            figures = measure()
        except Exception as error:  # whatever fails on a machine never seen before must not cost the other rows
            figures = {"error": describe_error(error)}
        self.row(**labels, **figures)

    def finish(self, error: BaseException | None = None) -> None:
        """Say that the stage is done, or failed."""
        self._content["status"] = "done" if error is None else "failed"
        self._content["error"] = None if error is None else describe_error(error)
        self._write()

    def _write(self) -> None:
        self._content["seconds"] = round(time.monotonic() - self._start, 2)
        write_json(self._path, self._content)


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file by one rename."""
    replace_file(path, json.dumps(content, indent=1).encode() + b"\n")


def read_record(path: Path, stage: str) -> dict[str, Any]:
    """Return the record of a stage; an empty one if its process ended before it wrote any."""
    if not path.is_file():
        return {"stage": stage, "status": "running", "error": None, "facts": {}, "rows": [], "seconds": 0.0}
    record: dict[str, Any] = json.loads(path.read_bytes())
    return record


def describe_error(error: BaseException) -> str:
    """Return type and message of an error on one line of at most 300 characters."""
    return one_line(f"{type(error).__name__}: {error}")[:LINE_LENGTH]
