"""Progress that remembers what was reported to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class RecordedProgress:
    """Both protocols of :mod:`promprune.progress`.

    Attributes:
        announced: number of steps.
        steps: descriptions of the steps that began, in order.
        finished: number of steps that ended without an error.
        items: of all steps; ``done`` of them were counted.
        reports: fractions and phases.
    """

    def __init__(self, on_report: Callable[[float, str], None] = lambda fraction, phase: None) -> None:
        self.announced = self.finished = self.items = self.done = 0
        self.steps: list[str] = []
        self.reports: list[tuple[float, str]] = []
        self._on_report = on_report

    def announce(self, steps: int) -> None:
        self.announced += steps

    @contextmanager
    def step(self, description: str, *, items: int | None = None) -> Iterator[RecordedProgress]:
        self.steps.append(description)
        self.items += items or 0
        yield self
        self.finished += 1

    def advance(self, items: int = 1) -> None:
        self.done += items

    def report(self, fraction: float, phase: str) -> None:
        self.reports.append((fraction, phase))
        self._on_report(fraction, phase)
