"""Accepting requests and answering them: a bounded queue, threads that prepare, and one engine per language model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from promprune.runtime.engine.language_model import LanguageModel
from promprune.runtime.engine.request import Request
from promprune.runtime.engine.result import Stopwatch
from promprune.runtime.server.body import Body
from promprune.runtime.server.config import ServerConfig
from promprune.runtime.server.errors import ApiError, api_error, too_many_requests
from promprune.runtime.server.logs import log_failure
from promprune.runtime.server.metrics import Metrics
from promprune.runtime.server.models import ModelCatalog, ServedModel
from promprune.runtime.server.preparation import AbandonedError, Preparation
from promprune.runtime.server.schema import ChatRequest
from promprune.runtime.server.worker import EngineWorker, Piece

__all__ = ["Answer", "ChatService"]


class Lane:
    """One language model, with the requests that were accepted for it.

    Args:
        worker: the thread that runs its engine.
        limit: most accepted requests.
    """

    def __init__(self, worker: EngineWorker, limit: int) -> None:
        self.worker = worker
        self.limit = limit
        self.accepted = 0

    @property
    def waiting(self) -> int:
        """Number of accepted requests that do not run yet."""
        return max(0, self.accepted - self.worker.engine.load.running)


class Answer:
    """One accepted request: wait until it is :meth:`prepared`, read :meth:`texts`, and :meth:`close` it in any case.

    Args:
        model: the model that answers.
        chat: the body of the request.
        body: the body's share of memory, which is released when the request is prepared.
        lane: the lane of its language model.
        preparation: the threads that prepare it.
        metrics: told about the end.

    Attributes:
        views: the images as the model sees them, if the request asked for them; see :class:`Prepared`.
    """

    def __init__(
        self,
        model: ServedModel,
        chat: ChatRequest,
        body: Body,
        lane: Lane,
        preparation: Preparation,
        metrics: Metrics,
    ) -> None:
        self.model = model
        self._lane = lane
        self._metrics = metrics
        self.views: list[bytes] = []
        self._watch = Stopwatch()
        self._request: Request | None = None
        self._texts: list[str] = []
        self._changed = asyncio.Event()
        self._done = self._closed = False
        self._in_lane = True
        self._error: Exception | None = None
        self._outcome = "running"
        lane.accepted += 1
        self._preparing = asyncio.create_task(self._prepare(chat, body, preparation))
        self._preparing.add_done_callback(lambda _: self._leave())
        self._preparing.add_done_callback(lambda _: body.release())

    @property
    def request(self) -> Request:
        """The engine's request; call :meth:`prepared` first."""
        if self._request is None:
            raise RuntimeError("the request is not prepared")
        return self._request

    async def prepared(self) -> Request:
        """Wait until the images are encoded and the prompt is tokenized; return the engine's request.

        Raises:
            ApiError: the request is refused, or its preparation failed.
        """
        await asyncio.shield(self._preparing)
        self._raise_error()
        return self.request

    async def texts(self) -> AsyncIterator[str]:
        """Yield the text of the answer as it becomes final; several tokens at once if the reader is slow.

        Raises:
            ApiError: the answer failed.
        """
        done = False
        while not done:
            await self._changed.wait()
            self._changed.clear()
            done, texts, self._texts = self._done, self._texts, []
            if text := "".join(texts):
                yield text
        self._raise_error()

    def describe(self) -> dict[str, Any]:
        """Return what the log says of it: names and numbers only."""
        found: dict[str, Any] = {"model": self.model.name, "outcome": self._outcome}
        if self._request is not None:
            found["images"] = len(self._request.images)
            found["prompt_tokens"] = len(self._request.prompt_ids)
            found["completion_tokens"] = len(self._request.token_ids)
        return found

    def close(self, outcome: str = "cancelled") -> None:
        """Stop answering, unless the answer is complete; ``outcome`` is counted in that case."""
        if self._closed:
            return
        self._closed = True
        if self._request is not None and not self._done:
            self._lane.worker.cancel(self._request)
        if not self._done:
            self._finish(outcome)
            self._leave()

    async def _prepare(self, chat: ChatRequest, body: Body, preparation: Preparation) -> None:
        try:
            prepared = await preparation.prepare(
                self.model, chat, self._watch, is_wanted=lambda: not self._closed, reserve=body.reserve
            )
            if not self._closed:
                self._lane.worker.add(prepared.request, self._listen)
                self._request, self.views = prepared
        except AbandonedError:
            pass
        except Exception as error:
            if not self._closed:
                self._fail(error)

    def _listen(self, piece: Piece) -> None:
        if piece.text:
            self._texts.append(piece.text)
        if piece.done and self.request.error is not None:
            self._fail(self.request.error)
        elif piece.done:
            self._finish(self.request.finish_reason or "stop")
        self._changed.set()
        self._leave()

    def _fail(self, error: Exception) -> None:
        self._error = refused = api_error(error)
        if refused.status >= 500:
            log_failure(error)
        self._finish("refused" if refused.status < 500 else "failed")

    def _finish(self, outcome: str) -> None:
        self._done, self._outcome = True, outcome
        self._changed.set()
        self._metrics.note_end(self.model.name, outcome, self._request)

    def _leave(self) -> None:
        """Free the place in the queue, once neither a thread nor the engine works on the request."""
        if self._done and self._preparing.done() and self._in_lane:
            self._in_lane = False
            self._lane.accepted -= 1

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error


class ChatService:
    """Answers requests with the models of a catalog. Make it, and use it, on the event loop.

    Args:
        catalog: the models.
        config: the limits.
        metrics: where everything is counted.
    """

    def __init__(self, catalog: ModelCatalog, config: ServerConfig, metrics: Metrics) -> None:
        self.catalog = catalog
        self.config = config
        self.metrics = metrics
        self._preparation = Preparation(config)
        self._lanes: dict[LanguageModel, Lane] = {}
        for model in catalog:
            language_model = model.pipeline.language_model
            if language_model not in self._lanes:
                self._lanes[language_model] = self._open_lane(model)
        metrics.watch(self._lanes.values(), config.max_batch)

    def accept(self, chat: ChatRequest, body: Body) -> Answer:
        """Accept a request, and release its body's share of memory when it is prepared.

        Raises:
            ApiError: there is no such model, or the queue is full.
        """
        model = self.catalog.find(chat.model)
        if model is None:
            raise unknown_model(chat.model, self.catalog)
        lane = self._lanes[model.pipeline.language_model]
        if lane.accepted >= lane.limit:
            self.metrics.note_end(model.name, "rejected", None)
            raise too_many_requests(lane.accepted)
        return Answer(model, chat, body, lane, self._preparation, self.metrics)

    @property
    def is_alive(self) -> bool:
        """Whether all engines still run."""
        return all(lane.worker.is_alive for lane in self._lanes.values())

    def close(self) -> None:
        """Stop all threads."""
        self._preparation.close()
        for lane in self._lanes.values():
            lane.worker.close()

    def _open_lane(self, model: ServedModel) -> Lane:
        config = self.config
        engine = model.pipeline.engine(
            max_batch=config.max_batch,
            max_cache_tokens=config.max_cache_tokens,
            max_prefill_tokens=config.max_prefill_tokens,
        )
        worker = EngineWorker(engine, f"engine {model.name}", log_failure)
        return Lane(worker, config.max_batch + config.max_queue)


def unknown_model(name: str, catalog: ModelCatalog) -> ApiError:
    """Return the error of a request for a model that is not served."""
    served = ", ".join(model.name for model in catalog)
    return ApiError(
        404, f"there is no model {name[:200]!r}; expected one of {served}", code="model_not_found", param="model"
    )
