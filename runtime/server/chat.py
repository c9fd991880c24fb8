"""``POST /v1/chat/completions``: one request, answered at once or as a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from promprune.runtime.server.body import BodyReader, client_went_away, decode_chat
from promprune.runtime.server.errors import ApiError, internal_error
from promprune.runtime.server.logs import log_failure
from promprune.runtime.server.responses import ChunkWriter, completion, json_response
from promprune.runtime.server.schema import ChatRequest
from promprune.runtime.server.service import Answer, ChatService

__all__ = ["complete_chat"]

T = TypeVar("T")

_GRACE_S: Final = 1.0  # for sending the error that the time is over


async def complete_chat(http: HttpRequest) -> Response:
    """Answer a chat.

    Raises:
        ApiError: the request is refused, failed, or took too long; or the client went away.
    """
    service: ChatService = http.app.state.service
    bodies: BodyReader = http.app.state.bodies
    body = await bodies.read(http)
    try:
        chat = decode_chat(body.take())
        answer = service.accept(chat, body)
    except BaseException:
        body.release()
        raise
    http.scope["state"]["answer"] = answer  # for the log
    deadline = asyncio.get_running_loop().time() + service.config.request_timeout_s
    try:
        async with _time_limit(answer, deadline):
            await _unless_disconnected(http, answer.prepared())
            if not chat.stream:
                await _unless_disconnected(http, _read_to_end(answer))
    except BaseException:
        answer.close()
        raise
    if chat.stream:
        return _EventStream(answer, chat, deadline)
    return json_response(completion(answer.model.name, answer.request, answer.views))


class _EventStream(StreamingResponse):
    """The answer as server-sent events; closes it in the end, also if the client goes away or does not read."""

    def __init__(self, answer: Answer, chat: ChatRequest, deadline: float) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(_events(answer, chat, deadline), 200, headers, "text/event-stream")
        self._answer = answer
        self._end = deadline + _GRACE_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; a response that is not read in time stays incomplete."""
        try:
            async with asyncio.timeout_at(self._end):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            self._answer.close("timeout")
        finally:
            self._answer.close()


async def _events(answer: Answer, chat: ChatRequest, deadline: float) -> AsyncIterator[bytes]:
    writer = ChunkWriter(answer.model.name, includes_usage=chat.includes_usage)
    try:
        async with _time_limit(answer, deadline):
            yield writer.first(answer.request, answer.views)
            async for text in answer.texts():
                if event := writer.text(text):
                    yield event
            yield writer.last(answer.request)
    except ApiError as error:
        yield writer.error(error)
    except Exception as error:
        log_failure(error)
        yield writer.error(internal_error(error))


@asynccontextmanager
async def _time_limit(answer: Answer, deadline: float) -> AsyncIterator[None]:
    """End the block, and the answer, at a time of the event loop's clock with an :class:`ApiError`."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        answer.close("timeout")
        text = "the request took longer than this server allows"
        raise ApiError(504, text, kind="server_error", code="timeout") from error


async def _read_to_end(answer: Answer) -> None:
    async for _ in answer.texts():
        pass


async def _unless_disconnected(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of ``work``; cancel it if the client closes the connection.

    Raises:
        ApiError: the client went away.
    """
    tasks = asyncio.create_task(work), asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise client_went_away()
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
