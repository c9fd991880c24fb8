"""The record of one check of a verification, and the limits of the checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from promprune.package.manifest import CheckRecord

__all__ = ["BUDGET", "LIMITS", "Limits", "check"]

BUDGET: Final = "images with the whole budget in one stage"  # name of the check of mu and tau


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far a package may be from torch in fp32.

    Attributes:
        relative_error: largest |difference| divided by the standard deviation of the reference.
        identical_sets: smallest share of check images on which the kept set is that of the float64 method. Sets can
            differ by rounding if two tokens are almost tied.
        overlap: smallest mean share of the kept tokens that the float64 method keeps too.
        equal_answers: smallest share of greedy answers that are equal to torch's, token for token.
    """

    relative_error: float
    identical_sets: float
    overlap: float
    equal_answers: float


# fp32: features and logits differ by some 1e-6 to 1e-5, a peaked saliency by up to 6e-5 on 200 images; a graph that is
# wired wrongly, by 1e-2 and more. fp16, on random models: up to 4.0e-2 in packages (a saliency behind 27 layers; else
# 1.3e-2), 8.8e-2 in transformers' own models in fp16. bf16, compared in fp32 on the same weights: up to 1.6e-2, as the
# graph's constants, such as the scale of the attention, are rounded to 8 bits; transformers' own models in bf16 are off
# by 1.9e-2 to 3.2e-1 (scripts/benchmarks/measure_precision.py).
LIMITS: Final = {
    "fp32": Limits(relative_error=3e-4, identical_sets=0.75, overlap=0.98, equal_answers=0.98),
    "fp16": Limits(relative_error=5e-2, identical_sets=0.75, overlap=0.98, equal_answers=0.75),
    "bf16": Limits(relative_error=3e-2, identical_sets=0.75, overlap=0.98, equal_answers=0.75),
}


def check(
    name: str,
    measured: float,
    comparison: Literal["<=", ">=", "=="],
    limit: float,
    detail: str = "",
    *,
    advisory: bool = False,
) -> CheckRecord:
    """Return the record of one check; it passes if ``measured`` is within ``limit``, compared by ``comparison``."""
    passed = {"<=": measured <= limit, ">=": measured >= limit, "==": measured == limit}[comparison]
    return CheckRecord(
        name=name,
        measured=float(measured) if np.isfinite(measured) else 1e308,  # JSON has no infinity
        comparison=comparison,
        limit=limit,
        passed=bool(passed),
        detail=detail,
        advisory=advisory,
    )
