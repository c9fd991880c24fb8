"""Figures, drawn with matplotlib without a display: entropies and budget split, accuracy against kept tokens."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from matplotlib.figure import Figure

from promprune.export.evaluation.config import ALL, NONE, ORACLE
from promprune.export.evaluation.runs import Run
from promprune.export.evaluation.scores import Score
from promprune.files import replace_file
from promprune.method.config import SelectionConfig
from promprune.method.entropy import saliency_ratio

if TYPE_CHECKING:
    from promprune.export.evaluation.calibration import Calibration

__all__ = ["plot_accuracy", "plot_entropies", "plot_split"]

# Distinguishable with every kind of colour vision (Okabe and Ito).
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"
_STYLES: Final[dict[str, dict[str, Any]]] = {
    "promprune": {"color": ORANGE, "linewidth": 2.2, "zorder": 3},
    "coverage": {"color": BLUE},
    "half": {"color": "#009e73"},
    "saliency": {"color": "#cc79a7"},
    "random": {"color": GREY, "linestyle": "--"},
    ORACLE: {"color": "#000000", "linestyle": ":"},
}
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
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:], dpi=150)
    replace_file(path, content.getvalue())


def _padded(values: tuple[float, ...]) -> tuple[float, float]:
    margin = 0.06 * float(np.ptp(values))
    return min(values) - margin, max(values) + margin


def plot_accuracy(scores: Sequence[Score], path: Path) -> None:
    """Draw accuracy against the share of tokens kept, a line per policy with its 95 % interval; .png or .svg."""
    figure = Figure(_SIZE, layout="constrained")
    axes = figure.subplots()
    torch_scores = [score for score in scores if score.run.condition.by == "torch"]
    full = [score for score in torch_scores if score.run.condition.policy == ALL]
    policies = dict.fromkeys(score.run.condition.policy for score in torch_scores)
    for policy in [name for name in policies if name not in (ALL, NONE)]:
        line = [score for score in torch_scores if score.run.condition.policy == policy] + full
        line.sort(key=lambda score: score.run.condition.ratio)
        kept = [100 * score.run.condition.ratio for score in line]
        style = _STYLES.get(policy, {})
        axes.plot(kept, [100 * score.accuracy.value for score in line], marker="o", markersize=3, label=policy, **style)
        low, high = zip(*((100 * score.accuracy.low, 100 * score.accuracy.high) for score in line), strict=True)
        axes.fill_between(kept, low, high, alpha=0.12, linewidth=0, color=style.get("color", GREY))
    ticks = sorted({100 * score.run.condition.ratio for score in torch_scores if score.run.condition.policy != NONE})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:.0f} %" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="visual tokens kept", ylabel="right answers, %")
    axes.set_title("shaded: 95 % intervals", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def plot_split(run: Run, config: SelectionConfig, path: Path) -> None:
    """Draw how many tokens each picture gave to saliency against its entropy; .png or .svg."""
    figure = Figure(_SIZE, layout="constrained")
    axes = figure.subplots()
    entropies = [selection.spectral_entropy or 0.0 for selection in run.selections]
    counts = [selection.saliency_count or 0 for selection in run.selections]
    axes.scatter(entropies, counts, s=12, color=BLUE, alpha=0.5, label="picture")
    line = torch.linspace(*_padded(tuple(entropies)), 200, dtype=torch.float64)
    split = saliency_ratio(line, config) * run.condition.keep_tokens
    axes.plot(line, split, color=ORANGE, linewidth=1, label="rule, before rounding")
    axes.axvline(config.mu, color=GREY, linewidth=1, linestyle=":", label=f"mu = {config.mu:g}")
    axes.set(
        xlabel="normalised spectral entropy",
        ylabel=f"tokens for saliency, of {run.condition.keep_tokens}",
        ylim=(-0.5, run.condition.keep_tokens + 0.5),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)
