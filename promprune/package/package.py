"""A package that was read and checked: its folder and its manifest in one object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from promprune.package.manifest import Manifest, read_manifest

__all__ = ["Package", "read_package"]


@dataclass(frozen=True)
class Package:
    """An exported package whose files were compared with its manifest.

    Attributes:
        folder: the package folder.
        manifest: its manifest.
    """

    folder: Path
    manifest: Manifest

    def graph_file(self, graph: str) -> Path:
        """Return the ONNX file of one of its graphs."""
        return self.folder / self.manifest.graphs[graph].file


def read_package(folder: Path, *, check_weights: bool = False) -> Package:
    """Read and validate a package; arguments and errors are those of :func:`read_manifest`."""
    return Package(folder, read_manifest(folder, check_weights=check_weights))
