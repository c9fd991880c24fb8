"""The text of one answer, as the engine generates it."""

from __future__ import annotations

from collections.abc import Callable

from promprune.runtime.engine.engine import Engine
from promprune.runtime.engine.request import Request
from promprune.runtime.engine.result import Result, ResultStream

__all__ = ["AnswerStream"]


class AnswerStream(ResultStream):
    """The text of one answer while it is generated: iterate over it, then read ``result``.

    The pieces, concatenated, are ``result.text``. The model runs only while the stream is read, so reading can stop at
    any time.

    Args:
        engine: the engine that runs the request; it steps while the stream is read.
        request: the request.
        on_result: called with the result when the stream has been read to its end.
    """

    def __init__(self, engine: Engine, request: Request, on_result: Callable[[Result], None] | None = None) -> None:
        self._engine = engine
        self._request = request
        self._on_result = on_result
        self._num_read = 0  # of the request's texts

    def __next__(self) -> str:
        while True:
            texts = self._request.texts[self._num_read :]
            self._num_read += len(texts)
            if text := "".join(texts):
                return text
            if self._request.done:
                self._finish()
                raise StopIteration
            self._engine.step()

    def _finish(self) -> None:
        if self._result is None and not self._request.cancelled:
            self._result = self._request.result()
            if self._on_result is not None:
                self._on_result(self._result)

    def close(self) -> None:
        """Stop generating."""
        self._engine.cancel(self._request)
