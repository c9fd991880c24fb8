"""Translating the chats and generation options of evaluation harnesses for the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from promprune.errors import ConfigError
from promprune.runtime.engine.chat_template import Message
from promprune.runtime.images.encoder import ImageSource

__all__ = ["UNDERSTOOD", "generation_options", "images_and_messages"]

# The options of tasks that are supported; `do_sample` and `num_beams` only with values that the runtime supports.
UNDERSTOOD: Final = frozenset({"do_sample", "max_new_tokens", "num_beams", "temperature", "top_k", "top_p", "until"})


def generation_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a task's options, which have the names of transformers' ``generate``.

    Tokens are sampled if ``temperature`` is above 0 and ``do_sample`` is not false, and chosen greedily otherwise.
    ``until``, a text or several, ends the answer. Options that are not in ``UNDERSTOOD`` are omitted.

    Raises:
        ConfigError: the task requires several beams.
    """
    if given.get("num_beams") not in (None, 1):
        raise ConfigError(
            f"the task requires num_beams = {given['num_beams']}", expected="1: the runtime has no beam search"
        )
    options: dict[str, Any] = {"stop": _texts(given.get("until")), "max_new_tokens": given.get("max_new_tokens")}
    temperature = given.get("temperature")
    if temperature and given.get("do_sample") is not False:
        options["temperature"] = temperature
        if given.get("top_p") is not None:
            options["top_p"] = given["top_p"]
        if given.get("top_k") is not None:
            options["top_k"] = given["top_k"]
    return options


def images_and_messages(chat: Sequence[Mapping[str, Any]]) -> tuple[list[ImageSource], list[Message]]:
    """Split a chat into its images, in order, and messages in which ``{"type": "image"}`` stands for each.

    Args:
        chat: messages with ``{"type": "text", "text": ...}`` and ``{"type": "image", "url": ...}`` parts; the url is
            an image in memory, or the path of a file.

    Raises:
        ConfigError: a part is something else, such as a video.
    """
    images: list[ImageSource] = []
    messages: list[Message] = []
    for message in chat:
        parts = []
        for part in message["content"]:
            if part["type"] not in ("image", "text"):
                raise ConfigError(f"the task has a part of type {part['type']!r}", expected="only images and texts")
            if part["type"] == "image":
                images.append(part["url"])
            parts.append({"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]})
        messages.append({"role": message["role"], "content": parts})
    return images, messages


def _texts(until: str | Sequence[str] | None) -> tuple[str, ...]:
    texts = (until,) if isinstance(until, str) else until or ()
    return tuple(text for text in texts if text)
