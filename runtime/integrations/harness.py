"""What evaluation harnesses ask, in the runtime's words: their chats, and their options for generating."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from promprune.errors import ConfigError
from promprune.runtime.engine.prompt import Message
from promprune.runtime.images.encoder import ImageSource

__all__ = ["UNDERSTOOD", "generation_options", "images_and_messages"]

# Of the options that tasks give; `do_sample` and `num_beams` only where they ask for what the runtime does.
UNDERSTOOD: Final = frozenset({"do_sample", "max_new_tokens", "num_beams", "temperature", "top_k", "top_p", "until"})


def generation_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a task's options, which are named as transformers' ``generate`` names them.

    Tokens are drawn where ``temperature`` is above 0 and ``do_sample`` is not false; everything else is greedy.
    ``until``, a text or several, ends the answer. What is not in ``UNDERSTOOD`` is left out.

    Raises:
        ConfigError: the task wants several beams.
    """
    if given.get("num_beams") not in (None, 1):
        raise ConfigError(
            f"the task wants num_beams = {given['num_beams']}", expected="1: the runtime has no beam search"
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
        chat: messages with ``{"type": "text", "text": ...}`` and ``{"type": "image", "url": ...}`` parts, where the
            url is an image in memory or a file's path.

    Raises:
        ConfigError: a part is something else, such as a video.
    """
    images: list[ImageSource] = []
    messages: list[Message] = []
    for message in chat:
        parts = []
        for part in message["content"]:
            if part["type"] not in ("image", "text"):
                raise ConfigError(f"the task shows a part of type {part['type']!r}", expected="images and texts only")
            if part["type"] == "image":
                images.append(part["url"])
            parts.append({"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]})
        messages.append({"role": message["role"], "content": parts})
    return images, messages


def _texts(until: str | Sequence[str] | None) -> tuple[str, ...]:
    texts = (until,) if isinstance(until, str) else until or ()
    return tuple(text for text in texts if text)
