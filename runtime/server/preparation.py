"""From the body of a request to a request of the engine, on threads beside the one that decodes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from promprune.runtime.engine.request import Request, time_stage
from promprune.runtime.engine.result import Stopwatch
from promprune.runtime.server.config import ServerConfig
from promprune.runtime.server.errors import ApiError
from promprune.runtime.server.messages import conversation_of
from promprune.runtime.server.models import ServedModel
from promprune.runtime.server.schema import ChatRequest

__all__ = ["Preparation"]

T = TypeVar("T")

_PREPROCESSING_THREADS = 2  # reading pictures and tokenizing; a large picture does not hold up a short text


class AbandonedError(Exception):
    """Nobody waits for the request any more."""


class Preparation:
    """Preprocesses requests on a few threads, and encodes their images one by one on another.

    Args:
        config: the limits.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._preprocessors = ThreadPoolExecutor(_PREPROCESSING_THREADS, "preprocess")
        self._encoder = ThreadPoolExecutor(1, "encode-images")

    async def prepare(
        self, model: ServedModel, chat: ChatRequest, watch: Stopwatch, is_wanted: Callable[[], bool]
    ) -> Request:
        """Return a request whose images are encoded.

        Args:
            model: the model that answers.
            chat: the body of the request.
            watch: adds the times to these.
            is_wanted: asked before each stage; if not, the preparation ends with an AbandonedError.

        Raises:
            AbandonedError: nobody waits for it any more.
            ApiError, ImageError, PromptError, ConfigError: the request is refused.
            BackendError: the vision graph failed.
        """

        def preprocess() -> Request:
            messages, images = conversation_of(chat.messages, self._config.max_images)
            options = self._generation_options(chat)
            request = model.pipeline.request(images, messages, watch=watch, **options)
            request.max_new_tokens = min(request.max_new_tokens, self._config.max_new_tokens)
            return request

        def encode() -> None:
            with time_stage("vision", [request]):
                request.encode_images(model.pipeline.encoder.encode)

        request = await _run(self._preprocessors, preprocess, is_wanted)
        if request.images:
            await _run(self._encoder, encode, is_wanted)
        return request

    def _generation_options(self, chat: ChatRequest) -> dict[str, Any]:
        """Return the settings of the answer; greedy unless the request has a temperature."""
        asked, most = chat.token_limit, self._config.max_new_tokens
        if asked is not None and asked > most:
            raise ApiError(
                400,
                f"the request asks for up to {asked} tokens; this server generates at most {most}",
                code="invalid_value",
                param="max_tokens" if chat.max_completion_tokens is None else "max_completion_tokens",
            )
        named = {
            "max_new_tokens": asked,
            "temperature": chat.temperature,
            "top_p": chat.top_p,
            "top_k": chat.top_k,
            "repetition_penalty": chat.repetition_penalty,
            "stop": chat.stop,
            "seed": None if chat.seed is None else chat.seed % 2**64,
            "ignore_eos": chat.ignore_eos,
        }
        return {name: value for name, value in named.items() if value is not None}

    def close(self) -> None:
        """Stop the threads, each after its current work."""
        for pool in (self._preprocessors, self._encoder):
            pool.shutdown(cancel_futures=True)


async def _run(pool: ThreadPoolExecutor, work: Callable[[], T], is_wanted: Callable[[], bool]) -> T:
    """Run a function on a pool; not if it is not wanted any more when its turn comes."""

    def checked() -> T:
        if not is_wanted():
            raise AbandonedError
        return work()

    return await asyncio.get_running_loop().run_in_executor(pool, checked)
