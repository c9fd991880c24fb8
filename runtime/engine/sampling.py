"""Choosing tokens, and decoding them to text incrementally, up to a stop text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from promprune.errors import BackendError
from promprune.runtime.engine.config import GenerationConfig
from promprune.runtime.engine.prompt import tokenizer_errors

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["FinishReason", "TextStream", "TokenChooser"]

_FIRST_CANDIDATES: Final = 256
_ROUNDING: Final = 1e-9  # of a sum of probabilities, in another order

FinishReason = Literal["stop", "length"]
_UNFINISHED: Final = "\N{REPLACEMENT CHARACTER}"  # decoded from an incomplete character


class TokenChooser:
    """Chooses one token from logits: greedily, or at random with a seed.

    The steps and their order are those of Hugging Face ``generate``: repetition penalty, temperature, top-k, top-p.

    Args:
        config: settings of choosing tokens.
        prompt_ids: tokens that ``repetition_penalty`` applies to from the beginning.
    """

    def __init__(self, config: GenerationConfig, prompt_ids: Iterable[int] = ()) -> None:
        self._config = config
        self._random = np.random.default_rng(config.seed)
        self._seen = set(prompt_ids) if config.repetition_penalty != 1.0 else set()

    def choose(self, logits: npt.NDArray[np.float32]) -> int:
        """Return the id of the next token.

        Args:
            logits: float32 [vocabulary].

        Raises:
            BackendError: the logits are not finite.
        """
        if not np.isfinite(logits.max()):
            raise BackendError(
                "the decoder returned logits that are not finite",
                expected="finite logits",
                fix="export with --dtype fp32: fp16 overflows in some models",
            )
        logits = self._penalize(logits)
        token = int(logits.argmax()) if self._config.temperature == 0 else self._draw(logits)
        if self._config.repetition_penalty != 1.0:
            self._seen.add(token)
        return token

    def _penalize(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if not self._seen:
            return logits
        penalty = np.float32(self._config.repetition_penalty)
        seen = np.fromiter((token for token in self._seen if token < logits.size), np.int64)
        logits = logits.copy()
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        return logits

    def _draw(self, logits: npt.NDArray[np.float32]) -> int:
        probabilities = probabilities_of(logits, self._config)
        cumulative = np.cumsum(probabilities)
        index = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(min(index, np.flatnonzero(probabilities)[-1]))


def probabilities_of(logits: npt.NDArray[np.float32], config: GenerationConfig) -> npt.NDArray[np.float64]:
    """Return the distribution that sampling draws from: temperature, then top-k, then top-p; float64 [vocabulary]."""
    scaled = (logits.astype(np.float64) - logits.max()) / config.temperature
    probabilities: npt.NDArray[np.float64] = np.exp(scaled)
    if 0 < config.top_k < logits.size:
        probabilities[scaled < np.partition(scaled, -config.top_k)[-config.top_k]] = 0
    probabilities /= probabilities.sum()
    if config.top_p < 1:
        order = _most_likely(probabilities, config.top_p)
        reached = np.cumsum(probabilities[order]) - probabilities[order]  # sum of the more likely ones
        kept = order[reached < config.top_p]
        nucleus = np.zeros_like(probabilities)
        nucleus[kept] = probabilities[kept] / probabilities[kept].sum()
        return nucleus
    return probabilities


def _most_likely(probabilities: npt.NDArray[np.float64], share: float) -> npt.NDArray[np.int64]:
    """Return the ids of the most likely tokens, in order, ties by id: at least as many as add up to ``share``.

    Sorting a vocabulary takes longer than all other steps of sampling together; few tokens have most of the share.
    """
    ids, count = np.flatnonzero(probabilities), _FIRST_CANDIDATES
    while count < ids.size:
        likely = np.flatnonzero(probabilities >= np.partition(probabilities, -count)[-count])
        if probabilities[likely].sum() > share + _ROUNDING:
            ids = likely
            break
        count *= 8
    return ids[np.argsort(-probabilities[ids], kind="stable")]


class TextStream:
    """Decodes token ids to text incrementally.

    Text is returned once no later token can change it: not in the middle of a multi-byte character, and not while
    it could be the beginning of a stop text. The texts of all calls, concatenated, are the decoded text up to the first
    stop text.

    Args:
        tokenizer: the tokenizer; special tokens are omitted from the text.
        stop: texts that end the answer; they are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._context = 0  # ids from here to _decoded are decoded again, because they affect the text after them
        self._decoded = 0
        self._held = ""  # decoded, but possibly the beginning of a stop text
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that became final, possibly empty. Sets ``stopped`` at a stop text.

        Raises:
            PackageError: the tokenizer fails.
        """
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._decoded])
        after = self._decode(self._ids[self._context :])
        if len(after) <= len(before) or after.endswith(_UNFINISHED):
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """Return the rest of the text: an unfinished character, or the beginning of a stop text.

        Raises:
            PackageError: the tokenizer fails.
        """
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._context : self._decoded])
        rest = self._decode(self._ids[self._context :])[len(before) :]
        text = self._release(rest)
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _decode(self, ids: list[int]) -> str:
        if not ids:
            return ""
        with tokenizer_errors("the package's tokenizer fails on the answer"):
            return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [position for position in map(text.find, self._stop) if position >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def eos_token_ids_of(generation_config: dict[str, Any]) -> frozenset[int]:
    """Return the end-of-sequence ids of a ``generation_config.json``: none, one or several."""
    value = generation_config.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return frozenset(token for token in values if isinstance(token, int) and not isinstance(token, bool))


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that ``stop`` begins with, shorter than ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
