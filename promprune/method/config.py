"""Settings of the selection: the only definition of the defaults for mu, tau, the policies and the order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from promprune.errors import ConfigError

__all__ = [
    "DEFAULT_LOOP",
    "LOOP_FORMS",
    "POLICIES",
    "LoopForm",
    "SelectionConfig",
    "SelectionPolicy",
    "TokenOrder",
    "check_loop",
]

TokenOrder = Literal["spatial", "selection"]
SelectionPolicy = Literal["promprune", "saliency", "coverage", "half", "random"]
LoopForm = Literal["loop", "fixed", "unrolled"]

LOOP_FORMS: Final = get_args(LoopForm)
DEFAULT_LOOP: Final[LoopForm] = "loop"
POLICIES: Final = get_args(SelectionPolicy)
_FIXED_SHARES: Final[dict[str, float]] = {"saliency": 1.0, "coverage": 0.0, "half": 0.5, "random": 0.0}


def check_loop(loop: str) -> None:
    """Refuse an unknown form of the greedy stage.

    Raises:
        ConfigError: ``loop`` is none of ``LoopForm``.
    """
    if loop not in LOOP_FORMS:
        raise ConfigError(f"received loop = {loop!r}", expected="one of " + ", ".join(LOOP_FORMS))


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How the kept tokens are chosen, and in which order they are returned.

    Attributes:
        policy: ``"promprune"`` splits the budget by the image's entropy; ``"saliency"``, ``"coverage"`` and
            ``"half"`` (half and half) split every image alike; ``"random"`` keeps the same positions of every image,
            drawn once with a fixed seed (:func:`promprune.method.reference.random_order`). Baselines to compare with.
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
    policy: SelectionPolicy = "promprune"

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
        if self.policy not in POLICIES:
            raise ConfigError(f"received policy = {self.policy!r}", expected="one of " + ", ".join(POLICIES))

    @property
    def saliency_limits(self) -> tuple[float, float]:
        """Smallest and largest share of the budget that saliency gets under this policy."""
        fixed = _FIXED_SHARES.get(self.policy)
        return (self.saliency_ratio_min, self.saliency_ratio_max) if fixed is None else (fixed, fixed)
