"""Checkpoints and packages that are made once per run of the tests, for all of its processes."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock

from promprune.export import ExportResult, export_package
from promprune.export.config import ExportConfig

Made = TypeVar("Made")


class Shared:
    """A folder of things that are made by the first process that asks for them, and never changed afterwards."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def make(self, name: str, make: Callable[[Path], Made]) -> Made:
        """Return what ``make`` returned for the path ``name``, in this process or another; it can be pickled."""
        record = self._folder / f"{name}.pickle"
        with FileLock(self._folder / f"{name}.lock"):
            if not record.exists():
                record.write_bytes(pickle.dumps(make(self._folder / name)))
        made: Made = pickle.loads(record.read_bytes())
        return made

    def export(self, name: str, model: Path | None = None, **options: Any) -> ExportResult:
        """Export a checkpoint, the embedded model by default."""

        def make(output: Path) -> ExportResult:
            return export_package(ExportConfig(model=None if model is None else str(model), output=output, **options))

        return self.make(name, make)
