"""Fit the polynomial of promprune/method/entropy_table.py, and print it with its error bound.

    python scripts/figures/fit_entropy_polynomial.py --products 9

A linear program finds the c_ij that minimise the largest |error| / (x + x0) on [0, 1]. The error is 0 at x = 0, so that
zero eigenvalues add none, and every |c_ij| max |V_i V_j| is at most 20, which limits cancellation in float32.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from promprune.method.entropy_table import EntropyTable

Array = NDArray[np.float64]

_COEFFICIENT_LIMIT = 20.0


def grid(points: int) -> Array:
    """Return points in (0, 1] that are dense at both ends: logarithmic points towards 0, and Chebyshev points."""
    logarithmic = np.logspace(-7, 0, points)
    chebyshev = (1 - np.cos(np.linspace(0, np.pi, points))) / 2
    merged = np.unique(np.concatenate([logarithmic, chebyshev]))
    return merged[merged > 0]


def chain(x: Array, multiplier: float, products: int) -> list[Array]:
    """Return V_0 .. V_K of the scalar x; V_0 = (a^2/4) x, so that every V stays in [0, a^2/4]."""
    values = [multiplier**2 / 4 * x]
    for _ in range(products):
        values.append(values[-1] * (multiplier - values[-1]))
    return values


def evaluate(table: EntropyTable, x: Array) -> Array:
    """Return the table's approximation of x ln x."""
    v = chain(x, table.multiplier, table.products)
    total: Array = table.linear * x + sum(c * v[i] * v[j] for i, j, c in table.pairs)
    return total


def error_bound(table: EntropyTable, points: int = 200_000) -> float:
    """Return the largest |error| / (x + x0) on a grid much finer than that of the fit."""
    x = grid(points)
    return float((np.abs(evaluate(table, x) - x * np.log(x)) / (x + table.x0)).max())


def fit(products: int, multiplier: float, x0: float, points: int = 800) -> EntropyTable:
    """Solve the linear program and round the coefficients to float32."""
    x = grid(points)
    v = chain(x, multiplier, products)
    index = [(i, j) for i in range(products + 1) for j in range(i, products + 1)]
    basis = np.stack([x, *(v[i] * v[j] for i, j in index)], axis=1)
    scale = np.abs(basis).max(axis=0)
    weighted = basis / scale / (x + x0)[:, None]
    target = x * np.log(x) / (x + x0)
    slack = -np.ones((len(x), 1))
    solution = optimize.linprog(
        np.append(np.zeros(basis.shape[1]), 1.0),
        A_ub=np.block([[weighted, slack], [-weighted, slack]]),
        b_ub=np.concatenate([target, -target]),
        bounds=[(-_COEFFICIENT_LIMIT, _COEFFICIENT_LIMIT)] * basis.shape[1] + [(0, None)],
        method="highs-ds",
    )
    if solution.status != 0:
        raise SystemExit(f"the linear program failed: {solution.message}")
    c = [float(np.float32(value)) for value in solution.x[:-1] / scale]
    pairs = tuple((i, j, value) for (i, j), value in zip(index, c[1:], strict=True) if value != 0)
    return EntropyTable(multiplier, products, c[0], pairs, float(solution.x[-1]), x0)


def as_source(table: EntropyTable, delta: float) -> str:
    """Return the table as Python source for promprune/method/entropy_table.py."""
    lines = [f"        ({i}, {j}, {c:.9g})," for i, j, c in table.pairs]
    return "\n".join(
        [
            "ENTROPY_TABLE = EntropyTable(",
            f"    multiplier={table.multiplier},",
            f"    products={table.products},",
            f"    linear={table.linear:.9g},",
            "    pairs=(",
            *lines,
            "    ),",
            f"    delta={math.ceil(delta * 1e7) / 1e7:.7f},",
            f"    x0={table.x0},",
            ")",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", type=int, default=9, help="matrix products K")
    parser.add_argument("--multiplier", type=float, default=3.4, help="a of V <- V (a I - V), below 4")
    parser.add_argument("--x0", type=float, default=0.05, help="offset of the weight x + x0")
    options = parser.parse_args(arguments)
    table = fit(options.products, options.multiplier, options.x0)
    delta = error_bound(table)
    print(as_source(table, delta))
    print(f"\n# largest |error| / (x + x0): {delta:.3g}; largest |c_ij|: {max(abs(c) for *_, c in table.pairs):.3g}")
    for n in (144, 256, 576, 1024, 2880):
        low, high = (delta * (1 + n * s * table.x0) / math.log(n) for s in (n**-0.5, 1.0))
        print(f"# n = {n:4d}: |dH| <= {low:.2g} for a flat spectrum, <= {high:.2g} for any")


if __name__ == "__main__":
    main()
