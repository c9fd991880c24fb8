"""Ending a run of a graph at a given time, from another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

__all__ = ["end_runs_after", "stoppable"]


class _Alarm:
    """Calls the functions that stop the runs that are in progress, once its time is up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rang = False
        self._stops: list[Callable[[], None]] = []

    def ring(self) -> None:
        with self._lock:
            self._rang = True
            for stop in self._stops:
                stop()

    def add(self, stop: Callable[[], None]) -> None:
        with self._lock:
            self._stops.append(stop)
            if self._rang:
                stop()

    def remove(self, stop: Callable[[], None]) -> None:
        with self._lock:
            self._stops.remove(stop)


_ALARM: Final[ContextVar[_Alarm | None]] = ContextVar("alarm", default=None)


@contextmanager
def end_runs_after(seconds: float | None) -> Iterator[None]:
    """End the runs of graphs in the block that are in progress or begin after ``seconds``; None for never.

    Only backends that use :func:`stoppable` can end a run.
    """
    if seconds is None:
        yield
        return
    alarm = _Alarm()
    timer = threading.Timer(max(0.0, seconds), alarm.ring)
    timer.daemon = True
    token = _ALARM.set(alarm)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        _ALARM.reset(token)


@contextmanager
def stoppable(stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop``, from another thread, if the time of the enclosing :func:`end_runs_after` ends in the block."""
    alarm = _ALARM.get()
    if alarm is None:
        yield
        return
    alarm.add(stop)
    try:
        yield
    finally:
        alarm.remove(stop)
