"""The schema of the API: OpenAI's chat completions, as far as they are supported, and what is added to them.

Unknown fields are refused, so that no setting is ignored without notice. Fields that only identify the caller or that
tune OpenAI's own service are accepted and ignored. Fields of features that are missing here are accepted with the value
that switches the feature off.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

__all__ = [
    "Asked",
    "ChatChunk",
    "ChatCompletion",
    "ChatRequest",
    "Choice",
    "ChunkChoice",
    "Delta",
    "ErrorBody",
    "ErrorDetail",
    "Extension",
    "Grid",
    "ImageDetail",
    "ImagePart",
    "ImageUrl",
    "Message",
    "ModelCard",
    "ModelDetail",
    "ModelList",
    "ResponseMessage",
    "StreamOptions",
    "TextPart",
    "TimingDetail",
    "TokenDetail",
    "Usage",
]

FinishReason = Literal["stop", "length"]
_INT64: Final = 2**63


class _Received(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object that clients send."""


class _Sent(msgspec.Struct, frozen=True, kw_only=True):
    """An object that the server sends."""


# An array of a feature that is missing. The elements of a longer one are refused one by one, not read first.
Empty = Annotated[list[None], Meta(max_length=0)]


class TextPart(_Received, frozen=True, tag_field="type", tag="text"):
    """A text in a message."""

    text: str


class ImageUrl(_Received, frozen=True):
    """The place of an image: a ``data:`` URL in base64."""

    url: Annotated[str, Meta(extra_json_schema={"pattern": "^data:image/[A-Za-z0-9.+-]{1,64};base64,"})]
    detail: Literal["auto", "low", "high", "original"] | None = None  # ignored: the package fixes the size


class ImagePart(_Received, frozen=True, tag_field="type", tag="image_url"):
    """An image in a message."""

    image_url: ImageUrl


class Message(_Received, frozen=True):
    """One message of a conversation. The last group of fields occurs in messages that a client received before."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart | ImagePart], Meta(min_length=1, max_length=1000)] | None = None
    name: str | None = None

    refusal: str | None = None
    annotations: Empty | None = None
    tool_calls: Empty | None = None
    function_call: None = None
    audio: None = None

    def __post_init__(self) -> None:
        if self.content is None and self.role != "assistant":
            raise ValueError("`content` is missing")


class StreamOptions(_Received, frozen=True):
    """Settings of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # ignored


class ResponseFormat(_Received, frozen=True):
    """The format of the answer."""

    type: Literal["text"]


class Asked(_Received, frozen=True):
    """What a client asks of promprune itself.

    Attributes:
        views: whether the response shows each image as the model sees it.
    """

    views: bool = False


StopText = Annotated[str, Meta(min_length=1, max_length=1000)]
TokenLimit = Annotated[int, Meta(ge=1, le=2**31 - 1)]

# Fields of features that are missing, and the values that switch them off, besides null.
_SWITCHED_OFF: Final = {
    "n": 1,
    "logprobs": False,
    "top_logprobs": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "tool_choice": "none",
    "function_call": "none",
}


def only(name: str) -> Meta:
    """Describe in the JSON schema which values of a field are supported."""
    return Meta(extra_json_schema={"enum": [_SWITCHED_OFF[name], None]})


class ChatRequest(_Received, frozen=True):
    """The body of ``POST /v1/chat/completions``."""

    model: str
    messages: Annotated[list[Message], Meta(min_length=1, max_length=1000)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: TokenLimit | None = None
    max_tokens: TokenLimit | None = None  # the former name
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-_INT64, le=_INT64 - 1)] | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=4)] | None = None

    # Not OpenAI's; the others are named as in vLLM.
    promprune: Asked | None = None
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None

    # Only what switches the feature off.
    n: Annotated[int | None, only("n")] = None
    logprobs: Annotated[bool | None, only("logprobs")] = None
    top_logprobs: Annotated[int | None, only("top_logprobs")] = None
    frequency_penalty: Annotated[float | None, only("frequency_penalty")] = None
    presence_penalty: Annotated[float | None, only("presence_penalty")] = None
    logit_bias: None = None
    tools: Empty | None = None
    tool_choice: Annotated[str | None, only("tool_choice")] = None
    functions: Empty | None = None
    function_call: Annotated[str | None, only("function_call")] = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None

    # Accepted and ignored.
    user: str | None = None
    metadata: msgspec.Raw | UnsetType = UNSET  # not decoded: it may be large
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    def __post_init__(self) -> None:
        for name, value in _SWITCHED_OFF.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(f"`{name}` is supported only with the value {value!r}")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("`max_tokens` and `max_completion_tokens` were both given; expected one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream` = true")

    @property
    def token_limit(self) -> int | None:
        """Most tokens of the answer that the client asks for; None if it does not say."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def shows_views(self) -> bool:
        """Whether the response shows each image as the model sees it."""
        return self.promprune is not None and self.promprune.views

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ErrorDetail(_Sent, frozen=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Sent, frozen=True):
    """The body of every response with a status of 400 or more."""

    error: ErrorDetail


class TokenDetail(_Sent, frozen=True):
    """Of which kinds the tokens of a prompt are.

    Attributes:
        cached_tokens: always 0: nothing is reused between requests.
        visual_tokens: visual tokens of all images before selection.
        kept_tokens: visual tokens of all images after selection.
    """

    cached_tokens: int
    visual_tokens: int
    kept_tokens: int


class Usage(_Sent, frozen=True):
    """Tokens of a request; ``prompt_tokens`` counts the kept visual tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetail


class Grid(_Sent, frozen=True):
    """A grid of patches, with its box in the view, in pixels of the view."""

    rows: int
    columns: int
    left: int
    top: int
    width: int
    height: int


class ImageDetail(_Sent, frozen=True):
    """Which visual tokens of an image were kept, and why.

    Attributes:
        grids: the grids of patches that the tokens come from.
        view_width, view_height: size of the part of the image that the model sees, in the size in which it sees it.
        visual_tokens: visual tokens before selection.
        kept_tokens: visual tokens after selection.
        token_indices: the kept tokens, numbered grid by grid, each in raster order.
        saliency: for each of them, whether it was kept for its saliency, or else for coverage; null in a package
            without selection.
        saliency_count: how many were kept for their saliency; null in a package without selection.
        spectral_entropy: normalised spectral entropy of the image in [0, 1]; null in a package without selection.
        policy: the policy that chose them.
        view: the part of the image that the model sees, as a data URL, if the request asked for views.
    """

    grids: list[Grid]
    view_width: int
    view_height: int
    visual_tokens: int
    kept_tokens: int
    token_indices: list[int]
    saliency: list[bool] | None
    saliency_count: int | None
    spectral_entropy: float | None
    policy: str
    view: str | UnsetType = UNSET


class TimingDetail(_Sent, frozen=True):
    """Where the time of an answer went.

    Attributes:
        queue_ms: waiting for a thread, for the vision encoder, or for a free place in the batch.
        vision_ms: vision encoder and selection; near 0 for images that were encoded before.
        prefill_ms: the language model on the prompt.
        first_token_ms: from the end of the request's body to the first token.
        decode_tokens_per_second: tokens per second after the first; null if there are no others.
    """

    queue_ms: float
    vision_ms: float
    prefill_ms: float
    first_token_ms: float
    decode_tokens_per_second: float | None


class Extension(_Sent, frozen=True, omit_defaults=True):
    """What promprune adds to a response; in a stream, ``images`` comes first and ``timings`` last."""

    images: list[ImageDetail] | UnsetType = UNSET
    timings: TimingDetail | UnsetType = UNSET


class ResponseMessage(_Sent, frozen=True):
    """The answer."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Choice(_Sent, frozen=True):
    """The only choice: n is 1."""

    message: ResponseMessage
    finish_reason: FinishReason
    index: int = 0
    logprobs: None = None


class ChatCompletion(_Sent, frozen=True):
    """The response to a request without ``stream``."""

    id: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    promprune: Extension
    object: Literal["chat.completion"] = "chat.completion"


class Delta(_Sent, frozen=True):
    """New text of the answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(_Sent, frozen=True):
    """The only choice: n is 1."""

    delta: Delta
    finish_reason: FinishReason | None = None
    index: int = 0
    logprobs: None = None


class ChatChunk(_Sent, frozen=True):
    """One event of a stream."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    promprune: Extension | UnsetType = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


class ModelDetail(_Sent, frozen=True):
    """What promprune adds to the description of a model.

    Attributes:
        ratio: the fraction of the visual tokens that is kept.
        visual_tokens: visual tokens of one image, or of one crop of it, before selection.
        kept_tokens: the same after selection.
        context_length: most tokens of prompt and answer together.
        max_images: most images of one request.
    """

    ratio: float
    visual_tokens: int
    kept_tokens: int
    context_length: int
    max_images: int


class ModelCard(_Sent, frozen=True):
    """A model, that is a package."""

    id: str
    created: int
    promprune: ModelDetail
    object: Literal["model"] = "model"
    owned_by: str = "promprune"


class ModelList(_Sent, frozen=True):
    """The response of ``GET /v1/models``."""

    data: list[ModelCard]
    object: Literal["list"] = "list"
