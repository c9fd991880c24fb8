"""Reading the body of a request, with limits on its size, its time, and the memory of all bodies together."""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from promprune.runtime.server.config import ServerConfig
from promprune.runtime.server.errors import ApiError
from promprune.runtime.server.schema import ChatRequest

__all__ = ["Body", "BodyReader", "client_went_away", "decode_chat"]

_BODIES_IN_MEMORY: Final = 8  # of the largest size; smaller ones are as many as fit into the same memory
_MISSING: Final = ("tools", "functions", "logit_bias", "audio", "prediction", "web_search_options")
_DECODER: Final = msgspec.json.Decoder(ChatRequest)


class Body:
    """The body of a request, and its share of the memory for bodies, which it holds until it is released.

    Args:
        reader: the reader whose memory it uses.
    """

    def __init__(self, reader: BodyReader) -> None:
        self._reader = reader
        self._content = bytearray()
        self._size_bytes = 0

    def append(self, chunk: bytes) -> int:
        """Add a chunk; return the size of the body so far, in bytes."""
        self._content += chunk
        self.reserve(len(chunk))
        return len(self._content)

    def reserve(self, size_bytes: int) -> None:
        """Take more of the memory for bodies, for what is made of this one.

        Raises:
            ApiError: too much of it is in use.
        """
        self._size_bytes += size_bytes
        self._reader.free_bytes -= size_bytes
        if self._reader.free_bytes < 0:
            text = "too many large requests arrive at the same time; try again later"
            headers = {**_CLOSE, "retry-after": "1"}
            raise ApiError(429, text, kind="rate_limit_error", code="too_many_bodies", headers=headers)

    def take(self) -> bytearray:
        """Return the content, and forget it; its share of the memory stays taken, for what is made of it."""
        content, self._content = self._content, bytearray()
        return content

    def release(self) -> None:
        """Return its share of the memory."""
        self._reader.free_bytes += self._size_bytes
        self._size_bytes = 0


class BodyReader:
    """Reads bodies.

    Args:
        config: the limits.

    Attributes:
        free_bytes: memory for bodies that is not in use.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self.free_bytes = _BODIES_IN_MEMORY * config.max_body_bytes

    async def read(self, http: HttpRequest) -> Body:
        """Return the body of a request; release it when nothing that was made of it is needed any more.

        Raises:
            ApiError: it is not JSON, too large, or too slow, or the client went away.
        """
        _check_content(http)
        body = Body(self)
        try:
            async with asyncio.timeout(self._config.body_timeout_s):
                async for chunk in http.stream():
                    self._check_size(body.append(chunk))
        except BaseException as error:
            body.release()
            if isinstance(error, TimeoutError):
                text = f"the body of the request did not arrive within {self._config.body_timeout_s:g} s"
                raise ApiError(408, text, code="body_timeout", headers=_CLOSE) from error
            if isinstance(error, ClientDisconnect):
                raise client_went_away() from error
            raise
        return body

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._config.max_body_bytes:
            text = f"the body of the request is larger than {self._config.max_body_bytes} bytes"
            raise ApiError(413, text, code="body_too_large", headers=_CLOSE)


_CLOSE: Final = {"connection": "close"}  # the rest of the body is not read


def _check_content(http: HttpRequest) -> None:
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # browsers send no other type to other sites without asking first
        text = f"the content type is {kind[:100]!r}; expected application/json"
        raise ApiError(415, text, code="unsupported_content_type", headers=_CLOSE)
    encoding = http.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        text = f"the content encoding is {encoding[:100]!r}; expected none"
        raise ApiError(415, text, code="unsupported_content_encoding", headers=_CLOSE)


def decode_chat(body: bytes | bytearray) -> ChatRequest:
    """Decode and check the body of a chat completion.

    Raises:
        ApiError: it is not JSON, or does not match the schema.
    """
    try:
        return _DECODER.decode(body)
    except msgspec.ValidationError as error:
        text, _, place = str(error).partition(" - at `$")
        param = place.removesuffix("`").removeprefix(".") or None
        if param is not None and param.partition("[")[0] in _MISSING:
            text = "this feature is not supported"
        raise ApiError(400, f"{param or 'the request'}: {text}", code="invalid_value", param=param) from error
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON ({error})"[:500], code="invalid_json") from error


def client_went_away() -> ApiError:
    """Return the outcome of a request whose client closed the connection; only the log shows it."""
    return ApiError(499, "the client closed the connection", code="client_went_away")
