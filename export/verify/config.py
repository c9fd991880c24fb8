"""Settings of the verification."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from promprune.errors import ConfigError

__all__ = ["DEFAULT_CHECK_IMAGES", "CompareConfig"]

DEFAULT_CHECK_IMAGES: Final = 8  # number of rendered images that a package is verified with


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of ``promprune-verify`` if it compares backends or packages.

    Attributes:
        backend: backend that runs the package; a key of ``promprune.export.verify.comparison.RUNNERS``.
        against: backend to compare with.
        reference: another package of the same model, which ``against`` runs; None for the same package.
        graphs: names of the graphs to compare; empty for all.
        layers: also compare the tensors inside the graphs, in order, up to the first one above the tolerance.
        tolerance: largest error that passes (see ``promprune.export.verify.comparison.TensorError``).

    Raises:
        ConfigError: a value is out of its range.
    """

    backend: str = "onnxruntime"
    against: str = "onnxruntime"
    reference: Path | None = None
    graphs: tuple[str, ...] = ()
    layers: bool = False
    tolerance: float = 2e-2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ConfigError(f"received tolerance = {self.tolerance:g}", expected="a finite number of at least 0")
