"""Conversations that reuse the KV cache of earlier turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from promprune.runtime.engine.cache import CachedPrefix
from promprune.runtime.engine.chat_template import Message
from promprune.runtime.engine.prompt import as_messages
from promprune.runtime.engine.request import Request
from promprune.runtime.engine.result import Result
from promprune.runtime.engine.stream import AnswerStream
from promprune.runtime.images.encoded import EncodedImage
from promprune.runtime.images.encoder import Images, as_image_list

if TYPE_CHECKING:
    from promprune.runtime.pipeline import VisionLanguagePipeline

__all__ = ["Chat"]


class Chat:
    """A conversation; images are encoded, and tokens prefilled, only once.

    The keys and values of all turns stay in memory: at most ``context_length`` times
    ``pipeline.cache_bytes_per_token`` bytes. For one thread at a time.

    Args:
        pipeline: the pipeline that answers.
        system: text of a system message, if the chat template supports one.

    Attributes:
        messages: the finished turns, as messages.
    """

    def __init__(self, pipeline: VisionLanguagePipeline, system: str | None = None) -> None:
        self.messages: list[Message] = [] if system is None else [_text_message("system", system)]
        self._pipeline = pipeline
        self._images: list[EncodedImage] = []
        self._prefix: CachedPrefix | None = None

    def ask(self, prompt: str, images: Images = (), **options: Any) -> Result:
        """Send a message, with or without further images, and return the answer.

        If a turn fails or is interrupted, the conversation is unchanged.

        Args and errors: as in :meth:`VisionLanguagePipeline.generate`.
        """
        return self.stream(prompt, images, **options).result

    def stream(self, prompt: str, images: Images = (), **options: Any) -> AnswerStream:
        """Like :meth:`ask`, with the text while it is generated; the turn is added when the stream has been read."""
        added = as_image_list(images)
        messages = [*self.messages, *as_messages(prompt, len(added))]
        request = self._pipeline.request(
            [*self._images, *added], messages, prefix=self._prefix, keep_cache=True, **options
        )
        engine = self._pipeline.engine()
        return AnswerStream(engine, engine.add(request), lambda result: self._append_turn(request, messages, result))

    def _append_turn(self, request: Request, messages: list[Message], result: Result) -> None:
        answer = _text_message("assistant", result.text.strip())  # templates add the space around it
        self.messages = [*messages, answer]
        self._images, self._prefix = request.encoded_images, request.cached_prefix


def _text_message(role: str, text: str) -> Message:
    return {"role": role, "content": [{"type": "text", "text": text}]}
