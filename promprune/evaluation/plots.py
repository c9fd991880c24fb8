"""Figures: entropies and the split they lead to, accuracy against tokens kept. Drawn with matplotlib, on no screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from matplotlib.figure import Figure

from promprune.config import SelectionConfig
from promprune.prominence import saliency_ratio

if TYPE_CHECKING:
    from promprune.export.calibration import Calibration

__all__ = ["plot_entropies"]

# Told apart with any kind of colour vision (Okabe and Ito).
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"
_SIZE: Final = (6.4, 3.6)


def plot_entropies(fitted: Calibration, path: Path) -> None:
    """Draw the histogram of the entropies, and the saliency share that mu and tau give to each; .png or .svg."""
    figure = Figure(_SIZE, layout="constrained")
    images = figure.subplots()
    images.hist(fitted.entropies, bins=32, color=BLUE, alpha=0.7)
    images.set(xlabel="normalised spectral entropy", ylabel="images", xlim=_padded(fitted.entropies))
    share = images.twinx()
    entropies = torch.linspace(*images.get_xlim(), 200, dtype=torch.float64)
    config = SelectionConfig(mu=fitted.mu, tau=fitted.tau)
    share.plot(entropies, saliency_ratio(entropies, config), color=ORANGE)
    share.axvline(fitted.mu, color=GREY, linewidth=1, linestyle=":")
    share.set(ylabel="share of the budget for saliency", ylim=(0, 1.02))
    share.yaxis.label.set_color(ORANGE)
    images.set_title(f"mu = {fitted.mu:g}, tau = {fitted.tau:g}", fontsize=10)
    figure.savefig(path, dpi=150)


def _padded(values: tuple[float, ...]) -> tuple[float, float]:
    margin = 0.06 * float(np.ptp(values))
    return min(values) - margin, max(values) + margin
