"""How a long operation reports its progress.

The operation announces its own steps. Nothing that reports progress knows how it is shown:
:func:`promprune.terminal.show_progress` draws bars, :data:`NO_PROGRESS` ignores everything.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

__all__ = ["NO_PROGRESS", "NO_STEP", "Progress", "Step"]


class Step(Protocol):
    """A step that is running."""

    def advance(self, items: int = 1) -> None:
        """Report that so many further items of the step are done."""

    def report(self, fraction: float, phase: str) -> None:
        """Report which fraction of the step is done, in [0, 1], and the name of its current phase."""


class Progress(Protocol):
    """Receives the steps of an operation."""

    def announce(self, steps: int) -> None:
        """Add ``steps`` to the number of steps that are going to run."""

    def step(self, description: str, *, items: int | None = None) -> contextlib.AbstractContextManager[Step]:
        """Run a step inside the returned context.

        Args:
            description: a few words for a person.
            items: number of items that the step counts with :meth:`Step.advance`; None if it counts none.
        """
        ...


class _Silent:
    """Both protocols, without any effect."""

    def announce(self, steps: int) -> None:
        pass

    def step(self, description: str, *, items: int | None = None) -> contextlib.AbstractContextManager[Step]:
        del description, items
        return contextlib.nullcontext(self)

    def advance(self, items: int = 1) -> None:
        pass

    def report(self, fraction: float, phase: str) -> None:
        pass


_SILENT = _Silent()
NO_PROGRESS: Progress = _SILENT
NO_STEP: Step = _SILENT
