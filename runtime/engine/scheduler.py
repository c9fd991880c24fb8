"""Choosing the requests that run in the next step."""

from __future__ import annotations

import threading
from collections import deque
from typing import NamedTuple

from promprune.errors import BackendError, ConfigError
from promprune.runtime.engine.cache import padded_tokens
from promprune.runtime.engine.request import Request

__all__ = ["Load", "Scheduler"]


class Load(NamedTuple):
    """How much an engine has to do.

    Attributes:
        waiting: requests that have not started.
        running: requests that hold a KV cache slot.
        cache_tokens: positions of the KV cache that are reserved for the running ones, including padding.
    """

    waiting: int
    running: int
    cache_tokens: int


class Scheduler:
    """First come, first served: requests start in the order of their arrival, and run until they are done.

    A waiting request starts as soon as the batch has a free row, and the KV cache is large enough for all running
    requests at their maximum length, prompt plus ``max_new_tokens``. So no running request is ever interrupted for lack
    of memory, and no request overtakes a larger one that waits.

    Thread-safe.

    Args:
        max_batch: most requests that run at once; None for no limit.
        max_cache_tokens: most positions of the KV cache, including padding, in all rows together; None for no limit.
        max_prefill_tokens: most tokens of the prompts that start in one step, but at least one prompt; None for no
            limit. A small number lets running requests wait less for those that start.

    Raises:
        ConfigError: a limit is below 1.
    """

    def __init__(
        self,
        max_batch: int | None = None,
        max_cache_tokens: int | None = None,
        max_prefill_tokens: int | None = None,
    ) -> None:
        limits = {
            "max_batch": max_batch,
            "max_cache_tokens": max_cache_tokens,
            "max_prefill_tokens": max_prefill_tokens,
        }
        for name, limit in limits.items():
            if limit is not None and limit < 1:
                raise ConfigError(f"received {name} = {limit}", expected="1 or more")
        self._max_batch = max_batch
        self._max_cache_tokens = max_cache_tokens
        self._max_prefill_tokens = max_prefill_tokens
        self._lock = threading.Lock()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ConfigError: the request exceeds a limit, and could never start.
        """
        if not self._fit([request]):
            raise ConfigError(
                f"received a request of up to {request.most_tokens} tokens",
                expected=f"at most max_cache_tokens = {self._max_cache_tokens}",
                fix="shorten the prompt, ask for fewer new tokens, or raise the limit",
            )
        with self._lock:
            self._waiting.append(request)

    def cancel(self, request: Request) -> None:
        """Mark a request as cancelled and done, unless it is done."""
        with self._lock:
            request.cancelled = request.cancelled or not request.done

    def schedule(self) -> tuple[list[Request], list[Request]]:
        """Drop requests that are done, start waiting ones; return the requests to decode, and those to prefill.

        A request whose prefill was interrupted, for example by a KeyboardInterrupt, is returned for prefill again.
        """
        with self._lock:
            self._drop_done()
            decoding = [request for request in self._running if request.slot is not None]
            starting = [request for request in self._running if request.slot is None]
            while self._waiting and self._may_start(self._waiting[0], starting):
                starting.append(self._waiting.popleft())
                self._running.append(starting[-1])
            return decoding, starting

    def expire(self) -> list[Request]:
        """End the waiting and running requests whose deadline has passed, and return them."""
        with self._lock:
            late = [request for request in (*self._running, *self._waiting) if not request.done and _is_late(request)]
            for request in late:
                request.fail(BackendError("the deadline passed"))
            return late

    @property
    def has_requests(self) -> bool:
        """Whether any request waits or runs."""
        with self._lock:
            return bool(self._waiting or self._running)

    @property
    def load(self) -> Load:
        """How many requests wait and run."""
        with self._lock:
            reserved = padded_tokens([request.most_tokens for request in self._running])
            return Load(len(self._waiting), len(self._running), reserved)

    def drop_done(self) -> None:
        """Free the rows of requests that are done."""
        with self._lock:
            self._drop_done()

    def _drop_done(self) -> None:
        for request in self._running:
            if request.done:
                request.slot = request.prefix = None
        self._running = [request for request in self._running if not request.done]
        self._waiting = deque(request for request in self._waiting if not request.done)

    def _may_start(self, request: Request, starting: list[Request]) -> bool:
        """Return whether a request may start in the same step as others, beside those that run."""
        prefill = sum(len(other.prompt_ids) - other.reused_tokens for other in [*starting, request])
        within = self._max_prefill_tokens is None or not starting or prefill <= self._max_prefill_tokens
        return within and self._fit([*self._running, request])

    def _fit(self, requests: list[Request]) -> bool:
        if self._max_batch is not None and len(requests) > self._max_batch:
            return False
        needed = padded_tokens([request.most_tokens for request in requests])
        return self._max_cache_tokens is None or needed <= self._max_cache_tokens


def _is_late(request: Request) -> bool:
    return request.seconds_left is not None and request.seconds_left <= 0
