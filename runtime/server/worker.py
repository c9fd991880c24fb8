"""The thread that runs an engine, and the engine's answers as they arrive on the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

from promprune.errors import BackendError
from promprune.runtime.engine.engine import Engine
from promprune.runtime.engine.request import Request

__all__ = ["EngineWorker", "Piece"]


class Piece(NamedTuple):
    """What one step brought to one request.

    Attributes:
        text: the text that became final, possibly empty.
        done: whether the request is answered or failed.
    """

    text: str
    done: bool


Listener = Callable[[Piece], None]


class EngineWorker:
    """Runs an engine on its own thread as long as it has requests.

    All methods are called on the event loop, where the listeners are called too.

    Args:
        engine: the engine; nobody else calls its ``step``.
        name: name of the thread.
        on_failure: called on the thread with an error that is not one request's own.
    """

    def __init__(self, engine: Engine, name: str, on_failure: Callable[[Exception], None]) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._on_failure = on_failure
        self._listeners: dict[Request, Listener] = {}
        self._wake = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self._engine

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def add(self, request: Request, listener: Listener) -> None:
        """Queue a request; ``listener`` is called after every step that brought it something.

        Raises:
            ConfigError: the request exceeds the engine's limits.
        """
        self._engine.add(request)
        self._listeners[request] = listener
        self._wake.set()

    def cancel(self, request: Request) -> None:
        """Stop answering a request, and free its slot at once or after the current step."""
        self._listeners.pop(request, None)
        self._engine.cancel(request)

    def close(self) -> None:
        """Stop after the current step."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            if not self._engine.has_requests:
                self._wake.wait()
                self._wake.clear()
                continue
            try:
                updates = self._engine.step()
            except Exception as error:
                self._on_failure(error)
                self._call(self._fail_all, BackendError("the engine failed", fix="ask again"))
                continue
            # One call for all: each one wakes the event loop.
            self._call(self._deliver, [(request, Piece(text, request.done)) for request, text in updates])

    def _call(self, method: Callable[..., None], *args: object) -> None:
        with suppress(RuntimeError):  # the event loop is closed
            self._loop.call_soon_threadsafe(method, *args)

    def _deliver(self, pieces: Sequence[tuple[Request, Piece]]) -> None:
        for request, piece in pieces:
            listener = self._listeners.pop(request, None) if piece.done else self._listeners.get(request)
            if listener is not None:
                listener(piece)

    def _fail_all(self, error: Exception) -> None:
        for request, listener in list(self._listeners.items()):
            self.cancel(request)
            request.error = error
            listener(Piece("", done=True))
