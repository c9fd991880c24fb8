"""The engine: requests join and leave a running batch between its steps (continuous batching).

::

    engine = pipeline.engine(max_batch=8)
    request = engine.add(pipeline.request("photo.jpg", "What is on the table?"))
    while engine.has_requests:
        for request, text in engine.step():
            print(text, end="")

``generate``, ``generate_batch``, ``stream`` and ``chat`` are such loops, each with its own engine.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from promprune.runtime.engine.cache import Cache, CachedPrefix, Slot
from promprune.runtime.engine.language_model import LanguageModel, Logits
from promprune.runtime.engine.request import Encode, Request, time_stage
from promprune.runtime.engine.scheduler import Load, Scheduler
from promprune.runtime.sessions.interrupt import end_runs_after

__all__ = ["Encode", "Engine", "Update"]

# A request, and the text that became final in a step.
Update: TypeAlias = "tuple[Request, str]"


class Engine:
    """Answers requests, one token per request and step.

    One thread calls :meth:`step` in a loop; :meth:`add` and :meth:`cancel` may be called from any thread meanwhile.
    Several engines may share one language model.

    Images are encoded in the step in which their request starts, which delays all other requests. To avoid that, call
    :meth:`Request.encode_images` on another thread before adding the request.

    Args:
        model: the language model.
        encode: encodes the images of requests; see ``ImageEncoder.encode``.
        max_batch: see :class:`Scheduler`; never more than the graphs take in one run.
        max_cache_tokens, max_prefill_tokens: see :class:`Scheduler`. During a step, the KV cache is in memory twice.
    """

    def __init__(
        self,
        model: LanguageModel,
        encode: Encode,
        *,
        max_batch: int | None = None,
        max_cache_tokens: int | None = None,
        max_prefill_tokens: int | None = None,
    ) -> None:
        self._model = model
        self._encode = encode
        limits = [limit for limit in (max_batch, model.max_batch) if limit is not None]
        self._scheduler = Scheduler(min(limits, default=None), max_cache_tokens, max_prefill_tokens)
        self._stepping = threading.Lock()

    def add(self, request: Request) -> Request:
        """Queue a request, and return it as its handle.

        Raises:
            ConfigError: the request alone exceeds the limits.
        """
        self._scheduler.add(request)
        return request

    def cancel(self, request: Request) -> None:
        """Stop answering a request; its batch row is freed at once, or after the current step."""
        self._scheduler.cancel(request)
        if self._stepping.acquire(blocking=False):
            try:
                self._scheduler.drop_done()
            finally:
                self._stepping.release()

    def step(self) -> list[Update]:
        """Run a decode step for all running requests, and a prefill for all waiting requests that can start.

        Returns:
            The requests that got a token or failed, with their new text; a request whose ``timeout_s`` is over has
            failed. Requests that are now ``done`` are not returned again; the ``error`` of a failed request does not
            affect the others.
        """
        with self._stepping:
            late = [(request, "") for request in self._scheduler.expire()]
            running, started = self._scheduler.schedule()
            with end_runs_after(_longest_time([*running, *started])):
                # Decoding first gathers, which frees rows.
                updates = [*late, *self._decode(running), *self._start(started)]
            self._scheduler.drop_done()
            return [(request, text) for request, text in updates if not request.cancelled]

    @property
    def has_requests(self) -> bool:
        """Whether any request is waiting or running."""
        return self._scheduler.has_requests

    @property
    def load(self) -> Load:
        """How many requests wait and run."""
        return self._scheduler.load

    def _start(self, requests: Sequence[Request]) -> list[Update]:
        """Encode the images of requests and prefill: in one batch, except for requests that reuse keys and values."""
        with time_stage("vision", requests):
            failed = [update for request in requests for update in self._encode_images(request)]
        ready = [request for request in requests if not request.done]
        together = [request for request in ready if not request.reused_tokens]
        groups = [[request] for request in ready if request.reused_tokens] + ([together] if together else [])
        return failed + [update for group in groups for update in self._prefill(group)]

    def _encode_images(self, request: Request) -> list[Update]:
        try:
            request.encode_images(self._encode)
        except Exception as error:
            return _fail([request], error)
        return []

    def _prefill(self, group: Sequence[Request]) -> list[Update]:
        begin = group[0].reused_tokens
        try:
            with time_stage("splice", group):
                spliced = self._model.splice([request.prompt for request in group], begin)
            with time_stage("prefill", group):
                before = self._cache_before(group)
                logits, cache = self._model.decoder.forward(spliced.embeds, before, spliced.mask, spliced.positions)
        except Exception as error:
            return _fail(group, error)
        return self._choose_tokens(group, logits, cache)

    def _cache_before(self, group: Sequence[Request]) -> Cache:
        """Return the cache of the tokens that are not prefilled: those reused by a single request, or none."""
        first = group[0]
        if first.prefix is not None and first.reused_tokens:
            return first.prefix.cache.truncate(first.reused_tokens)
        cache: Cache = self._model.decoder.caches.empty(len(group), max(request.most_tokens for request in group))
        return cache

    def _decode(self, running: Sequence[Request]) -> list[Update]:
        if not running:
            return []
        with time_stage("decode", running):
            try:
                cache = self._gather(running)
                logits, cache = self._model.decode([request.token_ids[-1] for request in running], cache)
            except Exception as error:
                return _fail(running, error)
            return self._choose_tokens(running, logits, cache)

    def _gather(self, running: Sequence[Request]) -> Cache:
        """Bring the rows of requests into one cache, which may end the caches that they are in."""
        cache: Cache = self._model.decoder.caches.gather([request.slot for request in running if request.slot])
        for row, request in enumerate(running):
            request.slot = Slot(cache, row)
        return cache

    def _choose_tokens(self, requests: Sequence[Request], logits: Logits, cache: Cache) -> list[Update]:
        """Choose the next token of each batch row; an error ends only the request that it concerns."""
        updates: list[Update] = []
        for row, request in enumerate(requests):
            request.slot = Slot(cache, row)
            try:
                updates.append((request, request.choose_token(logits[row])))
            except Exception as error:
                updates += _fail([request], error)
            self._note_progress(request)
        return updates

    def _note_progress(self, request: Request) -> None:
        if len(request.token_ids) == 1:
            request.watch.mark("first_token")
        if request.finish_reason is None or request.slot is None:
            return
        request.watch.mark("total")
        request.kv_cache_bytes = request.slot.nbytes
        if request.keep_cache:
            token_ids = np.append(request.prompt_ids, request.token_ids[:-1]).astype(np.int64)
            request.cached_prefix = CachedPrefix(token_ids, self._model.decoder.caches.extract(request.slot))


def _longest_time(requests: Sequence[Request]) -> float | None:
    """Return the seconds after which no request of a step waits for it any more; None if one has no deadline."""
    times = [request.seconds_left for request in requests]
    return None if not times or None in times else max(time for time in times if time is not None)


def _fail(requests: Sequence[Request], error: Exception) -> list[Update]:
    for request in requests:
        request.fail(error)
    return [(request, "") for request in requests]
