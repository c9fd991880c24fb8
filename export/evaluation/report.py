"""The results as tables: for the terminal, as Markdown, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from promprune.export.evaluation.data import Picture
from promprune.export.evaluation.runs import ALL, NONE, Condition
from promprune.export.evaluation.scores import Estimate, Score, difference, group_names
from promprune.markdown import markdown_table

__all__ = ["by_group", "comparisons", "markdown", "overview", "to_dict"]

Rows = list[list[str]]


def overview(scores: Sequence[Score]) -> Rows:
    """Return one row per run; the first row contains the column titles."""
    rows = [["answered by", "kept", "policy", "accuracy", "retained", "same answer"]]
    for score in scores:
        condition = score.run.condition
        rows.append(
            [
                condition.by,
                _kept(condition),
                condition.policy,
                _percent(score.accuracy),
                "" if score.retention is None or condition.policy in (ALL, NONE) else _percent(score.retention),
                "" if score.agreement is None or condition.policy == ALL else f"{100 * score.agreement:.1f}",
            ]
        )
    return rows


def by_group(scores: Sequence[Score], pictures: Sequence[Picture]) -> Rows:
    """Return accuracy per question type and picture group, with all tokens, the fewest, and without the image."""
    fewest = _fewest(scores)
    shown = [
        score
        for score in scores
        if score.run.condition.by == "torch"
        and (score.run.condition.policy in (ALL, NONE) or score.run.condition.keep_tokens == fewest)
    ]
    rows = [["question", "asked", *(score.run.condition.policy for score in shown)]]
    for name in group_names(pictures):
        cells = [f"{100 * score.groups[name]:.1f}" for score in shown]
        rows.append([name, str(shown[0].asked_of[name]), *cells])
    rows.append(["all", str(shown[0].asked), *(f"{100 * score.accuracy.value:.1f}" for score in shown)])
    return rows


def comparisons(scores: Sequence[Score], pictures: Sequence[Picture], groups: Sequence[str]) -> Rows:
    """Return the advantage of PromPrune over every other policy with the same T, in percentage points of accuracy."""
    rows = [["kept", "promprune against", "all questions", *groups]]
    ours = {score.run.condition.keep_tokens: score for score in scores if _is(score, "promprune")}
    for score in scores:
        condition = score.run.condition
        own = ours.get(condition.keep_tokens)
        if condition.by != "torch" or own is None or condition.policy in (ALL, NONE, "promprune"):
            continue
        cells = [_points(difference(own.run, score.run, pictures, group)) for group in (None, *groups)]
        rows.append([_kept(condition), condition.policy, *cells])
    return rows


def markdown(rows: Rows) -> str:
    """Format rows as a Markdown table."""
    header, *body = rows
    return markdown_table(header, body, text_columns=len(header)) + "\n"


def table_of(rows: Rows, title: str) -> Table:
    """Format rows as a table for the terminal."""
    table = Table(*rows[0], title=title, title_justify="left", title_style="bold")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def to_dict(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return plain numbers, for JSON."""
    return [
        {
            "by": score.run.condition.by,
            "policy": score.run.condition.policy,
            "keep_tokens": score.run.condition.keep_tokens,
            "num_tokens": score.run.condition.num_tokens,
            "questions": score.asked,
            "accuracy": _numbers(score.accuracy),
            "retention": score.retention and _numbers(score.retention),
            "agreement": score.agreement,
            "groups": score.groups,
        }
        for score in scores
    ]


def _fewest(scores: Sequence[Score]) -> int:
    kept = [score.run.condition.keep_tokens for score in scores if score.run.condition.policy != NONE]
    return min(kept)


def _is(score: Score, policy: str) -> bool:
    return score.run.condition.by == "torch" and score.run.condition.policy == policy


def _kept(condition: Condition) -> str:
    return f"{condition.keep_tokens} ({condition.ratio:.0%})"


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _points(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def _numbers(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}
