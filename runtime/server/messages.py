"""From OpenAI's messages to a prompt of the runtime and its images."""

from __future__ import annotations

import binascii
import re
from typing import Any, Final, NamedTuple

from promprune.runtime.server.errors import ApiError
from promprune.runtime.server.schema import ImagePart, Message

__all__ = ["Conversation", "RemoteImage", "conversation_of"]

_DATA_URL: Final = re.compile(r"data:image/[\w.+-]{1,64};base64,", re.ASCII | re.IGNORECASE)


class RemoteImage(NamedTuple):
    """An image that has to be fetched.

    Attributes:
        url: its address.
        param: the field of the request that names it.
    """

    url: str
    param: str


class Conversation(NamedTuple):
    """A prompt and its images.

    Attributes:
        messages: messages as :class:`VisionLanguagePipeline` takes them.
        images: the bytes of the image files, or where they are, in order.
    """

    messages: list[dict[str, Any]]
    images: list[bytes | RemoteImage]


def conversation_of(messages: list[Message], max_images: int, *, allow_remote: bool) -> Conversation:
    """Translate the messages of a request.

    Raises:
        ApiError: there are too many images, or an image is neither a data URL in base64 nor an allowed remote image.
    """
    images: list[bytes | RemoteImage] = []
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
                images.append(_image(part.image_url.url, number, place, allow_remote=allow_remote))
                parts.append({"type": "image"})
            else:
                parts.append({"type": "text", "text": part.text})
        role = "system" if message.role == "developer" else message.role
        translated.append({"role": role, "content": content if isinstance(content, str) else parts})
    return Conversation(translated, images)


def _image(url: str, message: int, part: int, *, allow_remote: bool) -> bytes | RemoteImage:
    """Return the content of a data URL, or a remote image if these are allowed."""
    head = _DATA_URL.match(url)
    if head is None:
        is_remote = url[:8].lower().startswith(("http:", "https:"))
        if is_remote and allow_remote:
            return RemoteImage(url, f"messages[{message}].content[{part}].image_url.url")
        raise _refuse(
            "the image is not a data URL; this server fetches no images; "
            "send data:image/png;base64,... with the content of the file"
            if not allow_remote
            else "the image is neither a data URL in base64 nor an http: or https: URL",
            "remote_image" if is_remote else "invalid_image_url",
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
