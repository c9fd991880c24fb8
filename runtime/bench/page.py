"""One self-contained HTML page of a report: tables, and plots as inline SVG, without external resources."""

from __future__ import annotations

import html
import io
import itertools
import re
from datetime import UTC, datetime
from typing import Any, Final

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from promprune.runtime.bench.report import FIRST_TOKEN_STAGES, Gain, Report, gains
from promprune.runtime.bench.tables import GAINS, Grid, grids, machine_lines

__all__ = ["figures", "to_html"]

_COLOURS: Final = {
    "preprocess": "#9aa5b1",
    "vision": "#2f6db5",
    "selection": "#e07b1a",
    "splice": "#6b4fa0",
    "prefill": "#3f9a6b",
    "rest": "#dfe3e8",
}
_MARKERS: Final = "os^DvPX"  # markers instead of names, which would overlap if speed-ups are similar
_KIND_COLOURS: Final = {"package": "#2f6db5", "hugging_face": "#b5432f", "authors": "#e07b1a", "peer": "#6b4fa0"}
_LEGIBLE: Final = 0.7  # smallest width of a plot, relative to its full width
_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c232b; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem }
ul { padding-left: 1.1rem; color: #4a5560 } p { color: #4a5560; margin: .2rem 0 .6rem }
figure { margin: 1.5rem 0; overflow-x: auto } svg { max-width: 100%; height: auto }
div { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e3e7eb; white-space: nowrap }
th:first-child, td:first-child { text-align: left } th { font-weight: 600 } code { overflow-wrap: anywhere }
"""


def to_html(report: Report) -> str:
    """Return the page."""
    facts = "".join(f"<li>{_inline(line)}</li>" for line in machine_lines(report))
    plots = "".join(f"<figure>{_svg(figure)}</figure>" for figure in figures(report).values())
    outcome, others = _outcome_first(grids(report))
    title = f"Benchmark of {_date(report.created)}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{outcome}<ul>{facts}</ul>{plots}{others}</body></html>\n"
    )


def figures(report: Report) -> dict[str, Figure]:
    """Return the plots by name, without empty ones."""
    made = {
        "stages": _stages_figure(report),
        "gains": _gains_figure(report),
        "first-token": _first_token_figure(report),
        "memory": _memory_figure(report),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _stages_figure(report: Report) -> Figure:
    """Draw the time to first token by stage, one bar per contender, the fewest tokens first."""
    alone = sorted(report.alone(), key=lambda pair: (pair[0].kind != "package", pair[0].kind, pair[0].keep_tokens))
    figure, axes = _figure(9, 1.4 + 0.5 * len(alone))
    names = [f"{contender.name}\n{contender.keep_tokens} tokens" for contender, _ in alone]
    left = [0.0] * len(alone)
    for stage in FIRST_TOKEN_STAGES:
        widths = [case.stages[stage].median_ms if stage in case.stages else 0.0 for _, case in alone]
        axes.barh(names, widths, left=left, color=_COLOURS[stage], label=stage, height=0.62)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    whole = [case.stages["first_token"].median_ms for _, case in alone]
    rest = [max(total - start, 0.0) for total, start in zip(whole, left, strict=True)]
    axes.barh(names, rest, left=left, color=_COLOURS["rest"], label="rest", height=0.62)
    for row, (total, parts) in enumerate(zip(whole, left, strict=True)):  # the sum of the stages' medians may be larger
        axes.annotate(
            f"{total:,.0f} ms", (max(total, parts), row), (4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"time to first token, ms (medians, {report.load_alone})")
    axes.set_title("Where the time to first token goes", loc="left", fontsize=11, pad=26)
    axes.legend(ncols=6, loc="lower left", bbox_to_anchor=(-0.01, 1.0), frameon=False, fontsize=8.5)
    return figure


def _gains_figure(report: Report) -> Figure | None:
    """Draw the speed-up against the reduction of FLOPs; the diagonal is the ideal."""
    counted = [gain for gain in gains(report) if gain.flops]
    if not counted:
        return None
    figure, axes = _figure(7.6, 4.6)
    ends = [_speed_ups(gain) for gain in counted]
    most = (
        max(max(1 / float(gain.flops or 1), fastest) for gain, (_, fastest) in zip(counted, ends, strict=True)) * 1.12
    )
    axes.plot([1, most], [1, most], color="#9aa5b1", linewidth=1, linestyle="--")
    axes.annotate("ideal", (most, most), (-12, 3), textcoords="offset points", ha="right", va="bottom", color="#6b7680")
    for gain, marker in zip(counted, itertools.cycle(_MARKERS), strict=False):
        _draw_gain(axes, gain, _KIND_COLOURS[report.contender(gain.contender).kind], marker)
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=8.5)
    axes.set_xlim(left=1)
    axes.set_ylim(bottom=min(1.0, *(slowest for slowest, _ in ends)) * 0.96)
    axes.set_xlabel("FLOPs of the unpruned baseline over FLOPs, up to the first token")
    axes.set_ylabel("first token: times as fast" + (" (95 % interval)" if counted[0].time.low is not None else ""))
    axes.set_title("Speed-up against the reduction of FLOPs", loc="left", fontsize=11)
    return figure


def _speed_ups(gain: Gain) -> tuple[float, float]:
    """Return the ends of the interval as speed-ups, the slower first; the estimate twice if there is no interval."""
    estimate, low, high = gain.time
    return 1 / (high or estimate), 1 / (low or estimate)


def _draw_gain(axes: Any, gain: Gain, colour: str, marker: str) -> None:
    x, y = 1 / float(gain.flops or 1), 1 / gain.time.estimate
    slowest, fastest = _speed_ups(gain)
    spread = [[y - slowest], [fastest - y]]
    axes.errorbar([x], [y], yerr=spread, fmt=marker, color=colour, capsize=3, label=gain.contender)


def _first_token_figure(report: Report) -> Figure:
    """Draw the distribution of the time to first token: a dot per call, at the share of calls that are as fast."""
    figure, axes = _figure(9, 3.6)
    styles = ("-", "--", "-.", ":")
    for row, (contender, case) in enumerate(report.alone()):
        times = sorted(case.stages["first_token"].samples_ms)
        shares = [(index + 1) / len(times) for index in range(len(times))]
        style = {"color": _KIND_COLOURS[contender.kind], "linestyle": styles[row % len(styles)]}
        axes.step(times, shares, where="post", marker=".", label=contender.name, **style)
    axes.set_ylim(0, 1.03)
    axes.set_xlabel(f"time to first token, ms ({report.load_alone})")
    axes.set_ylabel("share of calls as fast")
    axes.set_title("Distribution of the time to first token", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _memory_figure(report: Report) -> Figure | None:
    """Draw the peak host and device memory, measured in one process per contender."""
    measured = [(contender, contender.cold_start) for contender in report.contenders if contender.cold_start]
    if not measured:
        return None
    figure, axes = _figure(9, 1.2 + 0.45 * len(measured))
    for row, (contender, cold) in enumerate(measured):
        host, device = cold.peak_host_bytes / 1e9, (cold.peak_device_bytes or 0) / 1e9
        axes.barh([row], [host], color=_KIND_COLOURS[contender.kind], height=0.6)
        axes.barh([row], [device], left=[host], color=_KIND_COLOURS[contender.kind], alpha=0.45, height=0.6)
        shown = f"{host:.2f} GB" + (f" + {device:.2f} GB on the device" if device else "")
        axes.annotate(shown, (host + device, row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(measured)), [contender.name for contender, _ in measured])
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("peak resident memory up to the first token, GB")
    axes.set_title("Memory, one process per contender", loc="left", fontsize=11)
    return figure


def _svg(figure: Figure) -> str:
    """Draw a figure as an SVG element, without the header with URLs that matplotlib writes into its files."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "promprune"}):  # equal plots give equal text
        FigureCanvasSVG(figure).print_svg(stream)
    body = stream.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", body)
    legible = f"min-width: {_LEGIBLE * figure.get_figwidth():.1f}in"  # scrolls if the page is narrower
    return body.replace("<svg", f'<svg style="{legible}"', 1)


def _outcome_first(tables: list[Grid]) -> tuple[str, str]:
    """Return the tables in two parts: the gains, which readers look for first, and the rest."""
    first = [grid for grid in tables if grid.title.startswith(GAINS)]
    return "".join(map(_table, first)), "".join(_table(grid) for grid in tables if grid not in first)


def _date(created: str) -> str:
    return f"{datetime.fromisoformat(created).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _table(grid: Grid) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in grid.header)
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in grid.rows)
    note = f"<p>{html.escape(grid.note)}</p>" if grid.note else ""
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<h2>{html.escape(grid.title)}</h2>{note}<div>{body}</div>"


def _inline(line: str) -> str:
    escaped = html.escape(line)
    return f"<code>{escaped[1:-1]}</code>" if escaped.startswith("`") else escaped
