"""The goals, and how far a report reaches them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["goal_lines", "goals", "median_ms", "rows_of"]

SELECTION_MS, SPEED_UP, FIRST_TOKEN_REDUCTION = 1.0, 20.0, 0.70


def rows_of(report: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """Return the rows of a stage; none if it has not run."""
    rows: list[dict[str, Any]] = report["stages"].get(stage, {}).get("rows", [])
    return rows


def median_ms(rows: list[dict[str, Any]], **labels: Any) -> float | None:
    """Return the shortest median of the rows that have all of these labels; None if there is none."""
    found = [row["median_ms"] for row in rows if "median_ms" in row and labels.items() <= row.items()]
    return min(found, default=None)


def goals(report: dict[str, Any]) -> Iterator[tuple[str, float | None, float, bool | None]]:
    """Yield each goal: its name, the measured and the wanted figure, and whether it is reached; None: not measured."""
    selection, first = rows_of(report, "selection"), rows_of(report, "llava_next")
    batch = max((row["batch"] for row in selection if "batch" in row), default=0)
    ours = median_ms(selection, time="batched, Triton", batch=batch)
    eager = median_ms(selection, time="authors", batch=batch)
    whole = median_ms(first, time="first token", contender="all tokens")
    pruned = median_ms(first, time="first token", contender="ours")
    speed_up = eager / ours if eager and ours else None
    reduction = 1 - pruned / whole if pruned and whole else None
    yield f"selection at B = {batch}, ms, at most", ours, SELECTION_MS, None if ours is None else ours <= SELECTION_MS
    yield "times as fast as eager, at least", speed_up, SPEED_UP, None if speed_up is None else speed_up >= SPEED_UP
    reached = None if reduction is None else reduction >= FIRST_TOKEN_REDUCTION
    yield "first token of LLaVA-NeXT-7B less by, at least", reduction, FIRST_TOKEN_REDUCTION, reached


def goal_lines(report: dict[str, Any]) -> list[str]:
    """Return the goals as lines of text."""
    words = {True: "reached", False: "missed", None: "not measured"}
    lines = []
    for name, found, wanted, reached in goals(report):
        figure = "-" if found is None else f"{found:.3g}"
        lines.append(f"{words[reached]:<13}{name} {wanted:g}: {figure}")
    if report["kind"] == "rehearsal":
        lines.append("a rehearsal at tiny shapes on a CPU: these figures say nothing about a GPU")
    return lines
