"""One request: the prompt, and the state of its answer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from promprune.errors import BackendError, DeadlineError
from promprune.runtime.engine.cache import CachedPrefix, Slot
from promprune.runtime.engine.config import GenerationConfig
from promprune.runtime.engine.language_model import PromptTokens
from promprune.runtime.engine.prompt import TokenIds
from promprune.runtime.engine.result import Result, Stopwatch, Timings
from promprune.runtime.engine.sampling import FinishReason, TextStream, TokenChooser
from promprune.runtime.images import PreprocessedImage
from promprune.runtime.images.encoded import EncodedImage

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Encode", "Request", "time_stage"]

# Returns an encoded image, and whether the vision encoder ran for it: ``ImageEncoder.encode``.
Encode: TypeAlias = "Callable[[EncodedImage | PreprocessedImage], tuple[EncodedImage, bool]]"


@dataclass(eq=False, kw_only=True)
class Request:
    """One prompt and its answer so far; the handle of a request in :class:`Engine`.

    Args:
        prompt_ids: int64 [length], one placeholder per visual token.
        is_image: bool [length]; true for placeholders.
        images: the images, in the order of their placeholders; encoded, or only preprocessed.
        config: settings of choosing tokens.
        tokenizer: decodes the tokens.
        eos_token_ids: the tokens that end the answer.
        max_new_tokens: most tokens of the answer; prompt and answer fit into the context.
        prefix: keys and values of an earlier prompt to reuse; see :meth:`CachedPrefix.common_length`.
        keep_cache: store the keys and values of the complete answer in ``cached_prefix``.
        watch: times of the stages before the engine.

    Attributes:
        token_ids: tokens of the answer so far, including the end-of-sequence token.
        finish_reason: why the answer is complete: "stop" (end-of-sequence token or stop text) or "length"; else None.
        error: the error that ended the request; None if there was none.
        cancelled: whether it was cancelled.
        slot: its slot of the KV cache while it runs.
        cached_prefix: prompt and answer with their keys and values, if ``keep_cache``.
        num_encoded: number of images that the vision encoder ran for.
        kv_cache_bytes: memory of its keys and values at the end.
    """

    prompt_ids: TokenIds
    is_image: npt.NDArray[np.bool_]
    images: Sequence[EncodedImage | PreprocessedImage]
    config: GenerationConfig
    tokenizer: Tokenizer
    eos_token_ids: Collection[int]
    max_new_tokens: int
    prefix: CachedPrefix | None = None
    keep_cache: bool = False
    watch: Stopwatch = field(default_factory=Stopwatch)
    token_ids: list[int] = field(default_factory=list, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    error: Exception | None = field(default=None, init=False)
    cancelled: bool = field(default=False, init=False)
    slot: Slot[Any] | None = field(default=None, init=False)
    cached_prefix: CachedPrefix | None = field(default=None, init=False)
    num_encoded: int = field(default=0, init=False)
    kv_cache_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._chooser = TokenChooser(self.config, self.prompt_ids.tolist())
        self._stream = TextStream(self.tokenizer, self.config.stop)
        self._texts: list[str] = []
        self.reused_tokens = self.prefix.common_length(self.prompt_ids) if self.prefix else 0

    @property
    def done(self) -> bool:
        """Whether it is answered, failed or cancelled."""
        return self.finish_reason is not None or self.error is not None or self.cancelled

    def fail(self, error: Exception) -> None:
        """End the request with an error; with a DeadlineError if its time is over, whatever the error was."""
        self.error = error
        try:
            self.watch.check(self.config.timeout_s)
        except DeadlineError as late:
            late.__cause__ = error
            self.error = late

    @property
    def seconds_left(self) -> float | None:
        """Seconds until its deadline, negative after it; None if it has none."""
        return None if self.config.timeout_s is None else self.watch.left(self.config.timeout_s)

    @property
    def most_tokens(self) -> int:
        """The most positions of the KV cache that it needs: the last token of the answer needs none."""
        return len(self.prompt_ids) + self.max_new_tokens - 1

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    @property
    def texts(self) -> Sequence[str]:
        """The text that became final with each token, possibly empty."""
        return self._texts

    @property
    def encoded_images(self) -> list[EncodedImage]:
        """Its images, once all of them are encoded."""
        return [image for image in self.images if isinstance(image, EncodedImage)]

    def encode_images(self, encode: Encode) -> None:
        """Encode the images, one by one: in a batch, rounding and therefore the kept tokens could differ.

        The engine does this in the step in which the request starts; encoded images stay as they are.

        Raises:
            BackendError: the vision graph failed, or its outputs are not finite.
        """
        encoded = [encode(image) for image in self.images]
        self.images = [image for image, _ in encoded]
        self.num_encoded += sum(ran for _, ran in encoded)

    @property
    def prompt(self) -> PromptTokens:
        """The input of the language model."""
        return PromptTokens(self.prompt_ids, self.is_image, self.encoded_images)

    def choose_token(self, logits: npt.NDArray[np.float32]) -> str:
        """Choose the next token, given logits float32 [vocabulary]; return the text that became final.

        Raises:
            BackendError: the logits are not finite.
            PackageError: the tokenizer fails.
        """
        token = self._chooser.choose(logits)
        self.token_ids.append(token)
        text, reason = "", self._reason_to_stop(token)
        if token not in self.eos_token_ids:
            text = self._stream.push(token)
            reason = "stop" if self._stream.stopped else reason
        if reason is not None:
            text += self._stream.finish()
        self._texts.append(text)
        self.finish_reason = reason
        return text

    def _reason_to_stop(self, token: int) -> FinishReason | None:
        if token in self.eos_token_ids:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_new_tokens else None

    def result(self) -> Result:
        """Return the complete answer.

        Raises:
            BackendError: the answer is not complete.
            Exception: the error that ended the request.
        """
        if self.error is not None:
            raise self.error
        if self.finish_reason is None:
            raise BackendError("the answer was not finished", fix="ask again")
        return Result(
            text=self.text,
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            timings=self._timings(),
            selection=tuple(image.selection for image in self.encoded_images),
        )

    def _timings(self) -> Timings:
        watch = self.watch
        return Timings(
            preprocess_ms=watch["preprocess"],
            prompt_ms=watch["prompt"],
            vision_ms=watch["vision"],
            splice_ms=watch["splice"],
            prefill_ms=watch["prefill"],
            decode_ms=watch["decode"],
            first_token_ms=watch["first_token"],
            total_ms=watch["total"],
            prompt_tokens=len(self.prompt_ids),
            reused_tokens=self.reused_tokens,
            new_tokens=len(self.token_ids),
            encoded_images=self.num_encoded,
            kv_cache_bytes=self.kv_cache_bytes,
        )


@contextmanager
def time_stage(name: str, requests: Sequence[Request]) -> Iterator[None]:
    """Add the block's time to a stage of every request: requests of one batch wait for each other."""
    start = perf_counter()
    try:
        yield
    finally:
        elapsed_ms = (perf_counter() - start) * 1000
        for request in requests:
            request.watch.add(name, elapsed_ms)
