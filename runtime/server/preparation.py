"""From the body of a request to a request of the engine, on threads beside the one that decodes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from promprune.runtime.engine.request import Request, time_stage
from promprune.runtime.engine.result import Stopwatch
from promprune.runtime.server.config import ServerConfig
from promprune.runtime.server.errors import ApiError
from promprune.runtime.server.messages import Conversation, RemoteImage, conversation_of
from promprune.runtime.server.models import ServedModel
from promprune.runtime.server.remote import RemoteImageError, RemoteImages
from promprune.runtime.server.schema import ChatRequest

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Preparation", "Prepared"]

T = TypeVar("T")

_FETCHING_THREADS: Final = 8

_PREPROCESSING_THREADS: Final = 2  # reading pictures and tokenizing; a large picture does not hold up a short text


class Prepared(NamedTuple):
    """A request that can start.

    Attributes:
        request: the engine's request, with encoded images.
        views: the images as the model sees them, as JPEG files, if they were asked for; else empty.
    """

    request: Request
    views: list[bytes]


class AbandonedError(Exception):
    """Nobody waits for the request any more."""


class Preparation:
    """Fetches images and preprocesses requests on a few threads, and encodes their images one by one on another.

    Args:
        config: the limits.
        remote: fetches images, if the configuration allows it.
    """

    def __init__(self, config: ServerConfig, remote: RemoteImages | None = None) -> None:
        self._config = config
        self._remote = remote or RemoteImages()
        self._fetchers = ThreadPoolExecutor(_FETCHING_THREADS, "fetch-images")
        self._preprocessors = ThreadPoolExecutor(_PREPROCESSING_THREADS, "preprocess")
        self._encoder = ThreadPoolExecutor(1, "encode-images")

    async def prepare(
        self,
        model: ServedModel,
        chat: ChatRequest,
        watch: Stopwatch,
        is_wanted: Callable[[], bool],
        reserve: Callable[[int], None],
    ) -> Prepared:
        """Fetch the images of a request if need be, preprocess it, and encode its images.

        Args:
            model: the model that answers.
            chat: the body of the request.
            watch: adds the times to these.
            is_wanted: asked before each stage; if not, the preparation ends with an AbandonedError.
            reserve: called with the bytes of memory that fetched images may need.

        Raises:
            AbandonedError: nobody waits for it any more.
            ApiError, ImageError, PromptError, ConfigError: the request is refused.
            BackendError: the vision graph failed.
        """

        def translate() -> Conversation:
            allow_remote = self._config.allow_remote_images
            return conversation_of(chat.messages, self._config.max_images, allow_remote=allow_remote)

        def preprocess() -> Prepared:
            options = self._generation_options(chat)
            request = model.pipeline.request(images, messages, watch=watch, **options)
            request.max_new_tokens = min(request.max_new_tokens, self._config.max_new_tokens)
            views = (
                [_jpeg(model.pipeline.encoder.view(image, alone=len(images) == 1)) for image in images]
                if chat.shows_views
                else []
            )
            return Prepared(request, views)

        def encode() -> None:
            with time_stage("vision", [prepared.request]):
                prepared.request.encode_images(model.pipeline.encoder.encode)

        messages, sources = await _run(self._preprocessors, translate, is_wanted)
        if any(isinstance(source, RemoteImage) for source in sources):
            reserve(self._config.max_body_bytes)
            images = await _run(self._fetchers, lambda: self._fetch(sources), is_wanted)
        else:
            images = self._fetch(sources)
        prepared = await _run(self._preprocessors, preprocess, is_wanted)
        if prepared.request.images:
            await _run(self._encoder, encode, is_wanted)
        return prepared

    def _fetch(self, sources: Sequence[bytes | RemoteImage]) -> list[bytes]:
        """Return the content of all images, of which the remote ones together have at most the size of a body."""
        images, left = [], self._config.max_body_bytes
        for source in sources:
            if isinstance(source, bytes):
                images.append(source)
                continue
            try:
                images.append(self._remote.fetch(source.url, left))
            except RemoteImageError as error:
                raise ApiError(400, str(error), code="remote_image", param=source.param) from error
            left -= len(images[-1])
        return images

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
        for pool in (self._fetchers, self._preprocessors, self._encoder):
            pool.shutdown(cancel_futures=True)


async def _run(pool: ThreadPoolExecutor, work: Callable[[], T], is_wanted: Callable[[], bool]) -> T:
    """Run a function on a pool; not if it is not wanted any more when its turn comes."""

    def checked() -> T:
        if not is_wanted():
            raise AbandonedError
        return work()

    return await asyncio.get_running_loop().run_in_executor(pool, checked)


def _jpeg(image: Image) -> bytes:
    content = BytesIO()
    image.save(content, "JPEG", quality=90)
    return content.getvalue()
