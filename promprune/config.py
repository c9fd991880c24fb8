"""Settings as frozen dataclasses: every default of the project is stated here, once.

The command line takes its defaults from these classes, and every step receives one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from promprune.errors import ConfigError

__all__ = ["SelectionConfig", "TokenOrder"]

TokenOrder = Literal["spatial", "selection"]


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Parameters of PromPrune's budget split and of the order of its output.

    Attributes:
        mu: normalised spectral entropy, in [0, 1], at which the budget splits half and half (the paper's 0.42
            is for the CLIP-L tower of LLaVA; other towers need their own).
        tau: width of that transition, in units of entropy; above 0.
        saliency_ratio_min: smallest share of the budget that saliency gets, in [0, 1].
        saliency_ratio_max: largest share of the budget that saliency gets, in [0, 1].
        order: ``"spatial"`` keeps the selected tokens in the order of their positions in the image;
            ``"selection"`` is the authors' order: saliency tokens first, then coverage tokens as picked.

    Raises:
        ConfigError: a value is out of its range.
    """

    mu: float = 0.42
    tau: float = 0.02
    saliency_ratio_min: float = 0.0
    saliency_ratio_max: float = 1.0
    order: TokenOrder = "spatial"

    def __post_init__(self) -> None:
        if not math.isfinite(self.mu):
            raise ConfigError(f"received mu = {self.mu}", expected="a finite number")
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ConfigError(f"received tau = {self.tau}", expected="a finite number above 0")
        if not 0 <= self.saliency_ratio_min <= self.saliency_ratio_max <= 1:
            raise ConfigError(
                f"received saliency_ratio_min = {self.saliency_ratio_min}, "
                f"saliency_ratio_max = {self.saliency_ratio_max}",
                expected="0 <= saliency_ratio_min <= saliency_ratio_max <= 1",
            )
        if self.order not in ("spatial", "selection"):
            raise ConfigError(f"received order = {self.order!r}", expected="'spatial' or 'selection'")
