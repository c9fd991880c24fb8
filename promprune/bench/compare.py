"""Two reports against each other: did something become slower?"""

from __future__ import annotations

from dataclasses import dataclass

from promprune.bench.report import STAGES, Case, Report
from promprune.bench.statistics import Interval, paired_ratios, quantile, ratio_of_medians
from promprune.errors import ConfigError

__all__ = ["CompareConfig", "Difference", "compare_reports"]


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What ``promprune-bench compare`` is asked to do.

    Attributes:
        stage: whose time is compared.
        threshold: relative slow-down that is a regression, above 0.
        confidence: of the intervals, in (0, 1).
        relative_to: a contender of both reports; what is compared then is every other one's time over its time in
            the same round, which a machine that is slower today does not change.

    Raises:
        ConfigError: a value is out of its range.
    """

    stage: str = "first_token"
    threshold: float = 0.05
    confidence: float = 0.95
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
    """One case that both reports have.

    Attributes:
        contender, batch, concurrency: which.
        before, after: medians: milliseconds, or a ratio with ``relative_to``.
        ratio: after over before; above 1 is slower.
        regression: whether the ratio is past the threshold, and the interval says that it is no accident.
    """

    contender: str
    batch: int
    concurrency: int
    before: float
    after: float
    ratio: Interval
    regression: bool


def compare_reports(before: Report, after: Report, config: CompareConfig) -> list[Difference]:
    """Compare every case that both reports have.

    Raises:
        ConfigError: they have none in common, or ``relative_to`` is not in both.
    """
    found = []
    for case in before.cases:
        other = after.case(case.contender, case.batch, case.concurrency)
        if other is None or case.contender == config.relative_to:
            continue
        if config.stage in case.stages and config.stage in other.stages:
            found.append(_difference(case, _values(before, case, config), _values(after, other, config), config))
    if not found:
        raise ConfigError(
            f"the reports have no case with the stage {config.stage!r} in common",
            expected="the same contenders, batch and concurrency in both",
        )
    return found


def _values(report: Report, case: Case, config: CompareConfig) -> list[float]:
    """Return one value per round."""
    own = case.per_round(config.stage)
    if config.relative_to is None:
        return list(own)
    reference = report.case(config.relative_to, case.batch, case.concurrency)
    if reference is None or config.stage not in reference.stages:
        raise ConfigError(
            f"received relative to {config.relative_to!r}, which a report lacks",
            expected=f"one of {', '.join(contender.name for contender in report.contenders)}",
        )
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
        regression=ratio.estimate > 1 + config.threshold and ratio.low > 1,
    )
