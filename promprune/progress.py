"""How a long command tells what it is doing."""

from __future__ import annotations

import contextlib
from typing import Protocol

__all__ = ["NO_PROGRESS", "Progress"]


class Progress(Protocol):
    """Told of every step when it begins; the context ends when the step does."""

    def step(self, description: str) -> contextlib.AbstractContextManager[None]:
        """Begin a step; ``description`` is a few words for a person."""
        ...


class _NoProgress:
    def step(self, description: str) -> contextlib.AbstractContextManager[None]:
        del description
        return contextlib.nullcontext()


NO_PROGRESS: Progress = _NoProgress()
