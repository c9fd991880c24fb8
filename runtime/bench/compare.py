"""Comparing two reports: did anything become slower?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from promprune.errors import ConfigError
from promprune.runtime.bench.report import STAGES, Case, Report
from promprune.runtime.bench.statistics import (
    CONFIDENCE,
    Interval,
    least_rounds,
    paired_ratios,
    quantile,
    ratio_of_medians,
)
from promprune.runtime.sessions.providers import AUTO

__all__ = ["CompareConfig", "Comparison", "Difference", "MissingCase", "compare_reports"]

# Settings that must be equal in both reports; otherwise their times are of different work.
_SETTINGS: Final = ("prompt", "image_sha256", "new_tokens", "threads", "backend")
_FACTS: Final = ("kind", "model", "dtype", "device", "policy", "num_tokens", "keep_tokens")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of ``promprune-bench compare``.

    Attributes:
        stage: the stage whose time is compared.
        threshold: relative slowdown above which a difference is a regression; above 0.
        confidence: confidence level of the intervals, in (0, 1).
        relative_to: a contender of both reports; the time of every other contender is then divided by this one's in
            the same round, so that the speed of the machine cancels. None to compare times.

    Raises:
        ConfigError: a value is out of its range.
    """

    stage: str = "first_token"
    threshold: float = 0.05
    confidence: float = CONFIDENCE
    relative_to: str | None = None

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ConfigError(f"received stage {self.stage!r}", expected=f"one of {', '.join(STAGES)}")
        if not self.threshold > 0:
            raise ConfigError(f"received threshold = {self.threshold:g}", expected="above 0; 0.05 is 5 %")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"received confidence = {self.confidence:g}", expected="between 0 and 1; 0.95 is 95 %")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One case that both reports contain.

    Attributes:
        contender, batch, concurrency: the case.
        before, after: medians, in milliseconds; ratios with ``relative_to``.
        ratio: after / before; above 1 is slower.
        rounds: number of rounds of the report with fewer rounds.
        needed: number of rounds that an interval of the requested confidence needs.
        regression: whether the ratio is above the threshold and its interval is entirely above 1; false without an
            interval.
    """

    contender: str
    batch: int
    concurrency: int
    before: float
    after: float
    ratio: Interval
    rounds: int
    needed: int
    regression: bool

    @property
    def verdict(self) -> str:
        """The result in words."""
        if self.ratio.low is None:
            return f"too few rounds for an interval ({self.rounds} of {self.needed})"
        return "SLOWER" if self.regression else "ok"


class MissingCase(NamedTuple):
    """A case whose stage was measured in one report only.

    Attributes:
        contender, load: the case; the load in words.
        report: the report that lacks it: ``"A"``, the earlier one, or ``"B"``.
    """

    contender: str
    load: str
    report: str


class Comparison(NamedTuple):
    """The cases that were compared, and those that could not be."""

    differences: list[Difference]
    missing: list[MissingCase]


def compare_reports(before: Report, after: Report, config: CompareConfig) -> Comparison:
    """Compare every case that both reports contain, and list those that one of them lacks.

    Raises:
        ConfigError: the reports differ in work or settings, have no case in common, or one lacks ``relative_to``.
    """
    _refuse_other_work(before, after)
    for report in (before, after) if config.relative_to is not None else ():
        _expect_contender(report, config.relative_to)
    found = []
    for case in _cases(before, config):
        other = after.case(case.contender, case.batch, case.concurrency)
        if other is not None and _is_compared(after, other, config):
            found.append(_difference(case, _values(before, case, config), _values(after, other, config), config))
    if not found:
        raise ConfigError(
            f"the reports have no case with the stage {config.stage!r} in common",
            expected="the same contenders, batch and concurrency in both",
        )
    return Comparison(found, [*_missing(before, after, "B", config), *_missing(after, before, "A", config)])


def _refuse_other_work(before: Report, after: Report) -> None:
    for name in _SETTINGS:
        _refuse_other(name, getattr(before.settings, name), getattr(after.settings, name))
    providers = before.settings.provider, after.settings.provider
    if AUTO not in providers:  # "auto" stands for one of the others; the devices are compared below
        _refuse_other("provider", *providers)
    known = {contender.name: contender for contender in before.contenders}
    for other in after.contenders:
        for name in _FACTS if other.name in known else ():
            _refuse_other(f"{name} of {other.name}", getattr(known[other.name], name), getattr(other, name))


def _refuse_other(what: str, before: object, after: object) -> None:
    if before != after:
        raise ConfigError(
            f"received reports that differ in {what}: {before!r} in A, {after!r} in B",
            expected="two measurements of the same work",
            fix="run promprune-bench again with the settings of the other report",
        )


def _cases(report: Report, config: CompareConfig) -> Iterator[Case]:
    """Yield the cases to compare."""
    return (case for case in report.cases if _is_compared(report, case, config))


def _is_compared(report: Report, case: Case, config: CompareConfig) -> bool:
    """Return whether to compare a case; with ``relative_to``, only if that contender was measured under its load."""
    if case.contender == config.relative_to or config.stage not in case.stages:
        return False
    return config.relative_to is None or _reference(report, case, config.relative_to, config.stage) is not None


def _reference(report: Report, case: Case, relative_to: str, stage: str) -> Case | None:
    found = report.case(relative_to, case.batch, case.concurrency)
    return found if found is not None and stage in found.stages else None


def _expect_contender(report: Report, name: str | None) -> None:
    names = [contender.name for contender in report.contenders]
    if name not in names:
        raise ConfigError(
            f"received --relative-to {name!r}, which a report lacks", expected=f"one of {', '.join(names)}"
        )


def _missing(report: Report, other: Report, name: str, config: CompareConfig) -> Iterator[MissingCase]:
    """Yield the cases of ``report`` that ``other``, which is called ``name``, lacks."""
    there = {(case.contender, case.batch, case.concurrency) for case in _cases(other, config)}
    for case in _cases(report, config):
        if (case.contender, case.batch, case.concurrency) not in there:
            yield MissingCase(case.contender, case.load, name)


def _values(report: Report, case: Case, config: CompareConfig) -> list[float]:
    """Return one value per round."""
    own = case.per_round(config.stage)
    if config.relative_to is None:
        return list(own)
    reference = _reference(report, case, config.relative_to, config.stage)
    assert reference is not None  # every compared case has one
    return paired_ratios(own, reference.per_round(config.stage))


def _difference(case: Case, before: list[float], after: list[float], config: CompareConfig) -> Difference:
    ratio = ratio_of_medians(after, before, confidence=config.confidence)
    return Difference(
        contender=case.contender,
        batch=case.batch,
        concurrency=case.concurrency,
        before=quantile(before, 0.5),
        after=quantile(after, 0.5),
        ratio=ratio,
        rounds=min(len(before), len(after)),
        needed=least_rounds(config.confidence),
        regression=ratio.estimate > 1 + config.threshold and ratio.low is not None and ratio.low > 1,
    )
