"""Accuracy, the share of it that is retained, and confidence intervals.

Intervals are 95 % percentile intervals of a paired bootstrap over pictures: 4,000 resamples with replacement, each
picture with all its questions, and the same pictures for every condition. So questions about one picture are not
treated as independent, and pictures that are hard under all conditions cancel out of a comparison.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from promprune.export.evaluation.data import Picture, Question, is_right, normalise
from promprune.export.evaluation.runs import ALL, Run

__all__ = ["Estimate", "Score", "difference", "group_names", "majority_share", "scores"]

_RESAMPLES: Final = 4000
Member = Callable[[Picture, Question], bool]


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, as fractions."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """The score of one run.

    Attributes:
        run: the run.
        asked: number of questions.
        accuracy: share of right answers.
        retention: accuracy divided by that of the baseline on the same questions; None without a baseline.
        agreement: share of answers that are equal to the baseline's; None without a baseline.
        groups: question type or picture group -> accuracy.
        asked_of: question type or picture group -> number of questions.
    """

    run: Run
    asked: int
    accuracy: Estimate
    retention: Estimate | None
    agreement: float | None
    groups: dict[str, float]
    asked_of: dict[str, int]


def scores(runs: Sequence[Run], pictures: Sequence[Picture]) -> list[Score]:
    """Score every run against the baseline with the same ``by``, or else against the first baseline."""
    baselines = [run for run in runs if run.condition.policy == ALL]
    asked = _per_picture(pictures, None, lambda *_: True)
    found = []
    for run in runs:
        own = [base for base in baselines if base.condition.by == run.condition.by]
        base = next(iter([*own, *baselines]), None)
        right = _per_picture(pictures, run, lambda *_: True)
        names = group_names(pictures)
        counts = {name: _per_picture(pictures, None, member).sum() for name, member in names.items()}
        hits = {name: _per_picture(pictures, run, member).sum() for name, member in names.items()}
        found.append(
            Score(
                run=run,
                asked=int(asked.sum()),
                accuracy=_ratio(right, asked),
                retention=None if base is None else _ratio(right, _per_picture(pictures, base, lambda *_: True)),
                agreement=None if base is None else _agreement(run, base),
                groups={name: float(hits[name] / counts[name]) for name in names},
                asked_of={name: int(counts[name]) for name in names},
            )
        )
    return found


def difference(first: Run, second: Run, pictures: Sequence[Picture], group: str | None = None) -> Estimate:
    """Return the accuracy of the first run minus that of the second, on all questions or those of one group."""
    member = group_names(pictures)[group] if group else lambda *_: True
    asked = _per_picture(pictures, None, member)
    change = _per_picture(pictures, first, member) - _per_picture(pictures, second, member)
    return _ratio(change, asked)


def group_names(pictures: Sequence[Picture]) -> dict[str, Member]:
    """Return every question type, then every picture group, in the order of their first occurrence."""
    types = dict.fromkeys(question.type for picture in pictures for question in picture.questions)
    groups = dict.fromkeys(group for picture in pictures for group in picture.groups)
    names: dict[str, Member] = {name: _of_type(name) for name in sorted(types)}
    return names | {name: _of_group(name) for name in sorted(groups, key=lambda name: (len(name), name))}


def majority_share(pictures: Sequence[Picture]) -> float:
    """Return the accuracy of always giving the most frequent right answer to each question type in this data set."""
    answers: dict[str, Counter[str]] = {}
    for picture in pictures:
        for question in picture.questions:
            answers.setdefault(question.type, Counter()).update({normalise(text) for text in question.answers})
    asked = sum(len(picture.questions) for picture in pictures)
    return sum(found.most_common(1)[0][1] for found in answers.values()) / asked


def _of_type(name: str) -> Member:
    return lambda _, question: question.type == name


def _of_group(name: str) -> Member:
    return lambda picture, _: name in picture.groups


def _per_picture(pictures: Sequence[Picture], run: Run | None, member: Member) -> NDArray[np.float64]:
    """Return the number of right answers per picture, of questions in a group; without a run, of questions."""
    return np.array(
        [
            sum(
                member(picture, question) and (run is None or is_right(run.answers[index][number], question))
                for number, question in enumerate(picture.questions)
            )
            for index, picture in enumerate(pictures)
        ],
        np.float64,
    )


def _ratio(above: NDArray[np.float64], below: NDArray[np.float64]) -> Estimate:
    """Return the ratio of two sums over pictures; 0 if the denominator is 0."""
    drawn = np.random.default_rng(0).integers(len(above), size=(_RESAMPLES, len(above)))
    ratios = above[drawn].sum(axis=1) / np.maximum(below[drawn].sum(axis=1), 1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Estimate(float(above.sum() / max(below.sum(), 1)), float(low), float(high))


def _agreement(run: Run, base: Run) -> float:
    pairs = [
        normalise(one) == normalise(other)
        for ours, theirs in zip(run.answers, base.answers, strict=True)
        for one, other in zip(ours, theirs, strict=True)
    ]
    return sum(pairs) / len(pairs)
