"""Draw docs/entropy-error.png: error of the spectral entropy against the number of matrix products.

python scripts/figures/plot_entropy_error.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from promprune.method.entropy_table import ENTROPY_TABLE, EntropyTable  # noqa: E402
from scripts.figures.fit_entropy_polynomial import error_bound, evaluate, fit  # noqa: E402
from tests.support.feature_sets import feature_set  # noqa: E402

N, D, SETS = 576, 1024, 100
PRODUCTS = range(4, 13)
MULTIPLIERS = (3.3, 3.4, 3.5, 3.6, 3.7)


def spectrum(index: int) -> NDArray[np.float64]:
    """Return the normalised covariance eigenvalues of one feature set."""
    _, x, _ = feature_set(index, N, D)
    unit = x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    centred = unit - unit.mean(axis=0)
    p = np.linalg.eigvalsh(centred @ centred.T).clip(1e-12)
    return p / p.sum()


def entropy_errors(table: EntropyTable, spectra: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return |dH| of each spectrum, in float64."""
    errors = []
    for p in spectra:
        s = np.sqrt((p**2).sum())
        table_sum = np.log(s) + s * evaluate(table, p / s).sum()
        errors.append(abs(table_sum - (p * np.log(p)).sum()) / np.log(len(p)))
    return np.array(errors)


def main() -> None:
    spectra = [spectrum(index) for index in range(SETS)]
    bounds, largest, typical = [], [], []
    for products in PRODUCTS:
        candidates = [fit(products, a, ENTROPY_TABLE.x0, points=400) for a in MULTIPLIERS]
        table = min(candidates, key=lambda candidate: candidate.delta)
        errors = entropy_errors(table, spectra)
        largest_norm = max(np.sqrt((p**2).sum()) for p in spectra)
        bounds.append(error_bound(table) * (1 + N * largest_norm * table.x0) / np.log(N))
        largest.append(errors.max())
        typical.append(np.sqrt((errors**2).mean()))
        print(f"K = {products}: bound {bounds[-1]:.2g}, largest {largest[-1]:.2g}, rms {typical[-1]:.2g}")
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    axes.semilogy(PRODUCTS, bounds, "o--", color="0.6", label="guaranteed bound")
    axes.semilogy(PRODUCTS, largest, "s-", color="tab:blue", label=f"largest of {SETS} feature sets")
    axes.semilogy(PRODUCTS, typical, "^-", color="tab:orange", label="root mean square")
    axes.axvline(ENTROPY_TABLE.products, color="tab:green", lw=1, label="used")
    axes.set_xlabel("matrix products K")
    axes.set_ylabel("error of the normalised entropy H")
    axes.set_title(f"Spectral entropy from matrix products, N = {N}", fontsize=11)
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(ROOT / "docs" / "entropy-error.png", dpi=150)


if __name__ == "__main__":
    main()
