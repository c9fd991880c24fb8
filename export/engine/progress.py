"""Reporting the progress of a build, and stopping it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Report", "holding_signals", "make_monitor"]

Report = Callable[[float, str], None]


def make_monitor(trt: Any, report: Report, pending: list[int]) -> Any:
    """Make a progress monitor that turns the builder's nested phases into one fraction.

    It stops the builder at its next step once ``pending`` contains a signal.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # trt is Any
        def __init__(self) -> None:
            super().__init__()
            self.phases: dict[str, list[int]] = {}  # innermost last: [steps done, total steps]
            self.furthest = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = [0, max(num_steps, 1)]
            self.tell()

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.phases:
                self.phases[phase_name][0] = step + 1
            self.tell()
            return not pending

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def tell(self) -> None:
            fraction = 0.0
            for done, total in reversed(self.phases.values()):
                fraction = min((done + fraction) / total, 1.0)
            self.furthest = max(self.furthest, fraction)
            report(self.furthest, next(reversed(self.phases), ""))

    return Monitor()


@contextlib.contextmanager
def holding_signals() -> Iterator[list[int]]:
    """Hold back Ctrl-C and termination signals until the end of the block.

    The builder is C++ code that swallows exceptions raised by a signal while it calls back into Python.
    """
    pending: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = [signal.signal(number, lambda number, frame: pending.append(number)) for number in numbers]
    try:
        yield pending
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler or signal.SIG_DFL)
        if pending:
            signal.raise_signal(pending[0])
