"""Settings of generating an answer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from promprune.checks import check_integer, check_number, require

__all__ = ["GenerationConfig"]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How tokens are chosen, and when the answer ends.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1. None for as many as the context leaves, at most
            ``DEFAULT_NEW_TOKENS``. A number that does not fit the context is refused.
        temperature: 0 for greedy; above 0, tokens are sampled from softmax(logits / temperature).
        top_p: sample from the smallest set of tokens whose probability reaches ``top_p``, in (0, 1]; 1 is off.
        top_k: sample from the ``top_k`` most likely tokens; 0 is off.
        repetition_penalty: above 1, the logits of tokens in the prompt or the answer are lowered (divided if positive,
            multiplied if negative); 1 is off. Applies to greedy choice as well.
        stop: texts that end the answer; they are not part of it. One string, or a sequence of strings; kept as a tuple.
        seed: makes sampling reproducible; None for a new seed each time.
        timeout_s: most seconds from the call to the complete answer; None for no limit. Checked between the steps; ONNX
            Runtime also ends a step that is running. A request that takes longer fails with a DeadlineError.
        ignore_eos: continue after an end-of-sequence token, so that the answer has exactly ``max_new_tokens`` tokens.

    Raises:
        ConfigError: a value has the wrong type, or is out of its range.
    """

    DEFAULT_NEW_TOKENS: ClassVar[int] = 256

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: str | tuple[str, ...] | list[str] = ()
    seed: int | None = None
    timeout_s: float | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        check_integer(self, "max_new_tokens", least=1, optional=True)
        check_number(self, "temperature", lambda value: value >= 0, "a number of 0 or more")
        check_number(self, "top_p", lambda value: 0 < value <= 1, "a number in (0, 1]")
        check_integer(self, "top_k", least=0)
        check_number(self, "repetition_penalty", lambda value: value > 0, "a number above 0")
        if self.timeout_s is not None:
            check_number(
                self, "timeout_s", lambda value: 0 < value <= threading.TIMEOUT_MAX, "seconds above 0, or None"
            )
        texts = (self.stop,) if isinstance(self.stop, str) else self.stop
        valid = isinstance(texts, Sequence) and all(isinstance(text, str) and text for text in texts)
        require(valid, "stop", self.stop, "a non-empty string, or a sequence of such")
        object.__setattr__(self, "stop", tuple(texts))
        check_integer(self, "seed", least=0, most=None, optional=True)
