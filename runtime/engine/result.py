"""An answer, and the time of each of its stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from promprune.errors import BackendError, DeadlineError
from promprune.runtime.engine.sampling import FinishReason
from promprune.runtime.images.encoded import TokenSelection

__all__ = ["Result", "ResultStream", "Stopwatch", "Timings"]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Wall-clock times of one answer, in milliseconds. A stage that ran for a batch counts in full for each answer.

    Attributes:
        preprocess_ms: decoding and preprocessing the images.
        prompt_ms: chat template and tokenizer.
        vision_ms: vision encoder and selection; near 0 if every image was encoded before.
        splice_ms: token embeddings, with image features at the placeholders.
        prefill_ms: the decoder on the prompt.
        decode_ms: all further tokens.
        first_token_ms: from the call to the first token.
        total_ms: from the call to the last token; for a stream, includes the time between reads.
        prompt_tokens: tokens of the prompt, including visual tokens.
        reused_tokens: tokens of the prompt whose keys and values were cached by the previous turn.
        new_tokens: tokens of the answer.
        encoded_images: images that the vision encoder ran for; the others were encoded before.
        kv_cache_bytes: memory of the answer's keys and values at its end, including padding and spare capacity.
    """

    preprocess_ms: float
    prompt_ms: float
    vision_ms: float
    splice_ms: float
    prefill_ms: float
    decode_ms: float
    first_token_ms: float
    total_ms: float
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    encoded_images: int
    kv_cache_bytes: int

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second after the first; None if there are no others."""
        return (self.new_tokens - 1) / self.decode_ms * 1000 if self.new_tokens > 1 and self.decode_ms > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON; times rounded to microseconds."""
        values = {name: round(value, 3) if name.endswith("_ms") else value for name, value in asdict(self).items()}
        rate = self.decode_tokens_per_s
        return {**values, "decode_tokens_per_s": None if rate is None else round(rate, 2)}


@dataclass(frozen=True, eq=False)
class Result:
    """One answer.

    Attributes:
        text: the decoded answer, without special tokens, up to the first stop text.
        token_ids: all generated tokens, including the end-of-sequence token.
        finish_reason: ``"stop"`` (end-of-sequence token or stop text) or ``"length"`` (``max_new_tokens``).
        timings: the time of each stage.
        selection: the selection of each image, in order.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
    selection: tuple[TokenSelection, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, for JSON."""
        return {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "token_ids": list(self.token_ids),
            "timings": self.timings.to_dict(),
            "selection": [selection.to_dict() for selection in self.selection],
        }


class Stopwatch:
    """Adds up the times of named stages."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's time to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, (time.perf_counter() - start) * 1000)

    def add(self, name: str, elapsed_ms: float) -> None:
        """Add to a stage."""
        self._stages[name] = self._stages.get(name, 0.0) + elapsed_ms

    def copy(self) -> Stopwatch:
        """Return another one with the same beginning and the same times so far."""
        other = Stopwatch()
        other._start, other._stages = self._start, dict(self._stages)
        return other

    def left(self, timeout_s: float) -> float:
        """Return the seconds that are left of a time that began with the watch; negative if it is over."""
        return self._start + timeout_s - time.perf_counter()

    def check(self, timeout_s: float | None) -> None:
        """Refuse to continue if the time that began with the watch is over; None for no limit.

        Raises:
            DeadlineError: it is over.
        """
        if timeout_s is not None and self.left(timeout_s) <= 0:
            raise DeadlineError(
                f"the answer was not complete after timeout_s = {timeout_s:g}",
                fix="allow more time, or ask for fewer new tokens",
            )

    def mark(self, name: str) -> None:
        """Record the time since the beginning as a separate stage."""
        self._stages[name] = (time.perf_counter() - self._start) * 1000

    def __getitem__(self, name: str) -> float:
        """Return a stage's time, in milliseconds."""
        return self._stages.get(name, 0.0)


class ResultStream(Iterator[str]):
    """The text of one answer in pieces, and its result after the last piece; subclasses set ``_result``."""

    _result: Result | None = None

    @property
    def result(self) -> Result:
        """The complete answer; reads the rest of the stream first.

        Raises:
            BackendError: the stream was closed before its end.
            PrompruneError: the error that ended the answer.
        """
        for _ in self:
            pass
        if self._result is None:
            raise BackendError("the answer was not finished", fix="ask again")
        return self._result
