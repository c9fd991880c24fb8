"""From OpenAI's messages to a prompt of the runtime and its images."""

from __future__ import annotations

import binascii
import re
from typing import Any, Final, NamedTuple

from promprune.runtime.server.errors import ApiError
from promprune.runtime.server.schema import ImagePart, Message

__all__ = ["Conversation", "conversation_of"]

_DATA_URL: Final = re.compile(r"data:image/[\w.+-]{1,64};base64,", re.ASCII | re.IGNORECASE)


class Conversation(NamedTuple):
    """A prompt and its images.

    Attributes:
        messages: messages as :class:`VisionLanguagePipeline` takes them.
        images: the bytes of the image files, in order.
    """

    messages: list[dict[str, Any]]
    images: list[bytes]


def conversation_of(messages: list[Message], max_images: int) -> Conversation:
    """Translate the messages of a request.

    Raises:
        ApiError: there are too many images, or an image is not a data URL in base64.
    """
    images: list[bytes] = []
    translated = []
    for number, message in enumerate(messages):
        parts: list[dict[str, str]] = []
        content = message.content or ""
        for place, part in enumerate([] if isinstance(content, str) else content):
            if isinstance(part, ImagePart):
                if len(images) == max_images:
                    raise _refuse(
                        f"the request has more than {max_images} images", "too_many_images", number, place, "image_url"
                    )
                images.append(_image_bytes(part.image_url.url, number, place))
                parts.append({"type": "image"})
            else:
                parts.append({"type": "text", "text": part.text})
        role = "system" if message.role == "developer" else message.role
        translated.append({"role": role, "content": content if isinstance(content, str) else parts})
    return Conversation(translated, images)


def _image_bytes(url: str, message: int, part: int) -> bytes:
    """Return the content of a data URL; other URLs are refused, since the server fetches nothing."""
    head = _DATA_URL.match(url)
    if head is None:
        code = "remote_image" if url[:8].lower().startswith(("http:", "https:")) else "invalid_image_url"
        raise _refuse(
            "the image is not a data URL; this server fetches no images; "
            "send data:image/png;base64,... with the content of the file",
            code,
            message,
            part,
            "image_url.url",
        )
    try:
        return binascii.a2b_base64(url[head.end() :], strict_mode=True)
    except ValueError as error:
        text = f"the image is not valid base64 ({error}); expected the standard alphabet with padding"
        raise _refuse(text, "invalid_image_url", message, part, "image_url.url") from error


def _refuse(text: str, code: str, message: int, part: int, field: str) -> ApiError:
    return ApiError(400, text, code=code, param=f"messages[{message}].content[{part}].{field}")
