"""The fitted polynomial against eigenvalues in float64: its pointwise bound, and the entropy of many spectra."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from promprune.method.entropy_table import ENTROPY_TABLE
from tests.support.command_line import run_script

Array = NDArray[np.float64]


def chain(x: Array) -> list[Array]:
    values = [ENTROPY_TABLE.multiplier**2 / 4 * x]
    for _ in range(ENTROPY_TABLE.products):
        values.append(values[-1] * (ENTROPY_TABLE.multiplier - values[-1]))
    return values


def approximate(x: Array) -> Array:
    """An independent implementation of the table's x ln x."""
    v = chain(x)
    total = ENTROPY_TABLE.linear * x
    for i, j, c in ENTROPY_TABLE.pairs:
        total = total + c * v[i] * v[j]
    return total


def entropies(eigenvalues: Array) -> tuple[float, float, float]:
    """The exact normalised entropy, the table's, and the bound on their difference."""
    p = eigenvalues / eigenvalues.sum()
    n = max(len(p), 2)
    positive = p[p > 0]
    exact = -(positive * np.log(positive)).sum() / math.log(n)
    s = float(np.sqrt((p**2).sum()))
    table = -(math.log(s) + s * approximate(p / s).sum()) / math.log(n)
    bound = ENTROPY_TABLE.delta * (1 + len(p) * s * ENTROPY_TABLE.x0) / math.log(n)
    return float(exact), table, bound


def adversarial(rng: np.random.Generator) -> Iterator[Array]:
    """Spectra with nowhere to hide: single, equal, geometric and widely spread eigenvalues."""
    for n in (1, 2, 3, 16, 144, 576, 2880):
        yield np.ones(n)
        yield np.eye(1, n)[0]
        yield np.append(np.full(n, 1e-9), 1.0)
        for ratio in (0.01, 0.5, 0.9, 0.99, 0.999):
            yield ratio ** np.arange(n)
        for spread in (1.0, 5.0, 15.0):
            yield np.exp(-spread * rng.random(n))
        for small in np.logspace(-6, 0, 25):
            yield np.append(np.full(n, small), 1.0)


def test_pointwise_bound() -> None:
    x = np.unique(np.concatenate([np.logspace(-12, 0, 200_000), np.linspace(1e-6, 1, 200_000)]))
    error = np.abs(approximate(x) - x * np.log(x))
    assert (error / (x + ENTROPY_TABLE.x0)).max() <= ENTROPY_TABLE.delta


def test_exact_at_zero_and_stays_in_range() -> None:
    assert approximate(np.zeros(1))[0] == 0
    top = ENTROPY_TABLE.multiplier**2 / 4
    for values in chain(np.linspace(0, 1, 10_001)):
        assert values.min() >= 0
        assert values.max() <= top + 1e-12


def test_adversarial_spectra() -> None:
    for spectrum in adversarial(np.random.default_rng(0)):
        exact, table, bound = entropies(spectrum)
        assert abs(table - exact) <= bound + 1e-12


def test_thousands_of_spectra() -> None:
    rng = np.random.default_rng(1)
    worst = 0.0
    for _ in range(4000):
        n = int(rng.choice([144, 256, 576, 1024]))
        spectrum = rng.lognormal(0, rng.uniform(0.1, 5), n) * np.arange(1, n + 1) ** -rng.uniform(0, 2)
        exact, table, bound = entropies(spectrum)
        assert abs(table - exact) <= bound
        worst = max(worst, abs(table - exact))
    assert worst < 1e-4


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=60).filter(lambda p: sum(p) > 1e-3))
def test_any_spectrum(eigenvalues: list[float]) -> None:
    exact, table, bound = entropies(np.array(eigenvalues))
    assert abs(table - exact) <= bound + 1e-9


def test_coefficients_are_small_enough_for_float32() -> None:
    x = np.linspace(0, 1, 1001)
    v = [values.astype(np.float32) for values in chain(x)]
    total = np.float32(ENTROPY_TABLE.linear) * x.astype(np.float32)
    for i, j, c in ENTROPY_TABLE.pairs:
        total = total + np.float32(c) * v[i] * v[j]
    assert np.abs(total - approximate(x)).max() < 5e-6


@pytest.mark.slow
def test_fitting_again_gives_the_same_bound() -> None:
    report = run_script("scripts/figures/fit_entropy_polynomial.py", "--products", str(ENTROPY_TABLE.products)).stdout
    bound = re.search(r"largest \|error\| / \(x \+ x0\): (\S+);", report)
    assert bound is not None
    assert float(bound[1]) == pytest.approx(ENTROPY_TABLE.delta, rel=0.02)
