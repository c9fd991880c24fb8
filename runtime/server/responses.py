"""The objects that the server sends: completions, events of a stream, errors."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import msgspec
from starlette.responses import Response

from promprune.runtime.engine.request import Request
from promprune.runtime.engine.result import Result, Timings
from promprune.runtime.images.encoded import TokenSelection
from promprune.runtime.server.errors import ApiError
from promprune.runtime.server.schema import (
    ChatChunk,
    ChatCompletion,
    Choice,
    ChunkChoice,
    Delta,
    Extension,
    Grid,
    ImageDetail,
    ResponseMessage,
    TimingDetail,
    TokenDetail,
    Usage,
)

__all__ = ["ChunkWriter", "completion", "error_response", "json_response"]


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a response with an object of the schema, or plain values, as JSON."""
    return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """Return an error in OpenAI's format."""
    return json_response(error.body, error.status, error.headers)


def completion(model: str, request: Request, views: Sequence[bytes]) -> ChatCompletion:
    """Return the response to a request that is answered, with the views of its images if there are any."""
    result = request.result()
    return ChatCompletion(
        id=_new_id(),
        created=int(time.time()),
        model=model,
        choices=[Choice(message=ResponseMessage(content=result.text.lstrip()), finish_reason=result.finish_reason)],
        usage=_usage(result),
        promprune=Extension(images=_image_details(request, views), timings=_timing_detail(result.timings)),
    )


class ChunkWriter:
    """Writes the events of one stream.

    Args:
        model: name of the model.
        includes_usage: whether the last event holds the usage, which is null in the others.
    """

    def __init__(self, model: str, *, includes_usage: bool) -> None:
        self._includes_usage = includes_usage
        self._begun = False
        self._template = ChatChunk(
            id=_new_id(),
            created=int(time.time()),
            model=model,
            choices=[],
            **({"usage": None} if includes_usage else {}),  # type: ignore[arg-type]
        )

    def first(self, request: Request, views: Sequence[bytes]) -> bytes:
        """Return the event that begins the answer and describes its images."""
        delta = Delta(role="assistant", content="")
        extension = Extension(images=_image_details(request, views))
        return self._event([ChunkChoice(delta=delta)], promprune=extension)

    def text(self, text: str) -> bytes:
        """Return an event with new text; nothing for the space with which many models begin."""
        text = text if self._begun else text.lstrip()
        if not text:
            return b""
        self._begun = True
        return self._event([ChunkChoice(delta=Delta(content=text))])

    def last(self, request: Request) -> bytes:
        """Return the events that end the stream."""
        result = request.result()
        extension = Extension(timings=_timing_detail(result.timings))
        events = self._event([ChunkChoice(delta=Delta(), finish_reason=result.finish_reason)], promprune=extension)
        if self._includes_usage:
            events += self._event([], usage=_usage(result))
        return events + b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> bytes:
        """Return the event of an error in mid-stream, after which nothing follows."""
        return _event(error.body)

    def _event(self, choices: list[ChunkChoice], **changes: Any) -> bytes:
        return _event(msgspec.structs.replace(self._template, choices=choices, **changes))


def _event(content: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _usage(result: Result) -> Usage:
    prompt, new = result.timings.prompt_tokens, result.timings.new_tokens
    detail = TokenDetail(
        cached_tokens=0,
        visual_tokens=sum(selection.num_tokens for selection in result.selection),
        kept_tokens=sum(selection.keep_tokens for selection in result.selection),
    )
    return Usage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new, prompt_tokens_details=detail)


def _image_details(request: Request, views: Sequence[bytes]) -> list[ImageDetail]:
    details = [_image_detail(image.selection) for image in request.encoded_images]
    if not views:
        return details
    return [
        msgspec.structs.replace(detail, view=f"data:image/jpeg;base64,{base64.b64encode(view).decode()}")
        for detail, view in zip(details, views, strict=True)
    ]


def _image_detail(selection: TokenSelection) -> ImageDetail:
    mask = selection.saliency_mask
    return ImageDetail(
        grids=[Grid(**asdict(grid)) for grid in selection.grids],
        view_width=max(grid.left + grid.width for grid in selection.grids),
        view_height=max(grid.top + grid.height for grid in selection.grids),
        visual_tokens=selection.num_tokens,
        kept_tokens=selection.keep_tokens,
        token_indices=selection.token_indices.tolist(),
        saliency=None if mask is None else mask.tolist(),
        saliency_count=selection.saliency_count,
        spectral_entropy=selection.spectral_entropy,
        policy=selection.policy,
    )


def _timing_detail(timings: Timings) -> TimingDetail:
    stages = timings.preprocess_ms + timings.prompt_ms + timings.vision_ms + timings.splice_ms + timings.prefill_ms
    rate = timings.decode_tokens_per_s
    return TimingDetail(
        queue_ms=round(max(0.0, timings.first_token_ms - stages), 3),
        vision_ms=round(timings.vision_ms, 3),
        prefill_ms=round(timings.prefill_ms, 3),
        first_token_ms=round(timings.first_token_ms, 3),
        decode_tokens_per_second=None if rate is None else round(rate, 2),
    )
