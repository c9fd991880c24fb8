"""Quantiles, and confidence intervals of ratios by bootstrap over rounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["CONFIDENCE", "Interval", "least_rounds", "median_interval", "paired_ratios", "quantile", "ratio_of_medians"]

CONFIDENCE: Final = 0.95

_RESAMPLES: Final = 4000
_SEED: Final = 0

Floats = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """An estimate and its confidence interval, whose ends are None with fewer than :func:`least_rounds` rounds."""

    estimate: float
    low: float | None
    high: float | None


def least_rounds(confidence: float = CONFIDENCE) -> int:
    """Return how many rounds an interval needs for its nominal coverage: 6 for 95 %, 8 for 99 %.

    The interval spans at most the smallest to the largest of n values, and all n values are on one side of the true
    median with a probability of 2 / 2^n.
    """
    return math.ceil(1 - math.log2(1 - confidence))


def quantile(values: Sequence[float], fraction: float) -> float:
    """Return a quantile, interpolated linearly between the two nearest values; 0.5 is the median."""
    return float(np.quantile(np.asarray(values, np.float64), fraction))


def paired_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """Return the ratio within each round, so that drifts from round to round cancel."""
    return [above / below for above, below in zip(numerator, denominator, strict=True)]


def ratio_of_medians(
    numerator: Sequence[float], denominator: Sequence[float], *, confidence: float = CONFIDENCE
) -> Interval:
    """Return the ratio of two medians, with its interval from bootstrapping the rounds of each side independently.

    Args:
        numerator, denominator: one value per round, above 0; they may be from different rounds.
        confidence: confidence level of the interval.
    """
    random = np.random.default_rng(_SEED)
    above, below = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    estimate = float(np.median(above) / np.median(below))
    if min(len(above), len(below)) < least_rounds(confidence):
        return Interval(estimate, None, None)
    return _interval(estimate, _resampled_medians(above, random) / _resampled_medians(below, random), confidence)


def median_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval:
    """Return the median, with its interval from bootstrapping the rounds.

    Args:
        values: one value per round.
        confidence: confidence level of the interval.
    """
    drawn_from = np.asarray(values, np.float64)
    estimate = float(np.median(drawn_from))
    if len(values) < least_rounds(confidence):
        return Interval(estimate, None, None)
    return _interval(estimate, _resampled_medians(drawn_from, np.random.default_rng(_SEED)), confidence)


def _interval(estimate: float, resampled: Floats, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def _resampled_medians(values: Floats, random: np.random.Generator) -> Floats:
    drawn = random.integers(0, len(values), (_RESAMPLES, len(values)))
    medians: Floats = np.median(values[drawn], axis=1)
    return medians
