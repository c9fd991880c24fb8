"""Settings of the runtime; the command line and the Python API both take their defaults from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, Literal, TypedDict, get_args

from promprune.errors import ConfigError

__all__ = ["DEFAULT_NEW_TOKENS", "GenerationConfig", "GenerationOptions", "Provider", "RuntimeConfig", "RuntimeOptions"]

Provider = Literal["auto", "cpu", "cuda", "tensorrt", "tensorrt-rtx"]
DEFAULT_NEW_TOKENS: Final = 256


class GenerationOptions(TypedDict, total=False):
    """The fields of :class:`GenerationConfig`, as keyword arguments."""

    max_new_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    stop: str | tuple[str, ...] | list[str]
    seed: int | None
    ignore_eos: bool


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How tokens are chosen, and when to stop.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1. ``None``: as many as the context leaves, at most
            ``DEFAULT_NEW_TOKENS``. A number that does not fit the context is refused.
        temperature: 0 is greedy; above 0, tokens are drawn from softmax(logits / temperature).
        top_p: draw from the smallest set of tokens whose probability reaches ``top_p``, in (0, 1]; 1 is off.
        top_k: draw from the ``top_k`` likeliest tokens; 0 is off.
        repetition_penalty: above 1, the logits of tokens already in the prompt or the answer are lowered
            (divided when positive, multiplied when negative); 1 is off. Applies to greedy choice as well.
        stop: texts that end the answer; they are not part of it. One string, or a sequence of strings.
        seed: makes drawing reproducible; ``None`` draws a new seed each time.
        ignore_eos: go on after an end-of-sequence token, so that an answer has exactly the length that was asked for.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: str | tuple[str, ...] | list[str] = ()
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        limit = self.max_new_tokens
        _require(limit is None or (_is_int(limit) and limit >= 1), "max_new_tokens", limit, "an integer of at least 1")
        _require(_is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "0 or more")
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "a number in (0, 1]")
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        penalty = self.repetition_penalty
        _require(_is_number(penalty) and penalty > 0, "repetition_penalty", penalty, "a number above 0")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        _require(all(isinstance(text, str) and text for text in stop), "stop", self.stop, "non-empty strings")
        object.__setattr__(self, "stop", tuple(stop))
        _require(self.seed is None or (_is_int(self.seed) and self.seed >= 0), "seed", self.seed, "0 or more")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class RuntimeOptions(TypedDict, total=False):
    """The fields of :class:`RuntimeConfig`, as keyword arguments."""

    backend: str
    provider: Provider
    num_threads: int | None
    check_weights: bool
    image_cache_size: int
    prefill_chunk: int | None
    cuda_graphs: bool
    weight_budget_mib: int | None


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How a package is loaded.

    Attributes:
        backend: ``"onnxruntime"``, or another one of ``promprune.runtime.sessions.BACKENDS``.
        provider: of ONNX Runtime: ``"cpu"``, ``"cuda"``, ``"tensorrt"``, ``"tensorrt-rtx"``, or ``"auto"``: CUDA where
            it really loads, else the CPU.
        num_threads: CPU threads of one operator; ``None``: as many as this process may use.
        check_weights: compare the SHA-256 of the weight files with the manifest; reads them whole.
        image_cache_size: encoded images kept for reuse, keyed by a digest of their pixels; 0 is off.
        prefill_chunk: most tokens of a prompt that one run of the language model reads; ``None``: the whole prompt.
            Bounds the scratch memory of long prompts, at the price of more runs.
        cuda_graphs: with the backend ``"tensorrt"``, replay the vision encoder and the steps of the decoder as CUDA
            graphs; the latter takes the memory of two more KV caches of the largest size.
        weight_budget_mib: with the backend ``"tensorrt"`` and engines that stream weights, device memory for the
            weights of each engine, in MiB; ``None``: TensorRT's choice.

    Raises:
        ConfigError: a value is out of its range.
    """

    backend: str = "onnxruntime"
    provider: Provider = "auto"
    num_threads: int | None = None
    check_weights: bool = False
    image_cache_size: int = 8
    prefill_chunk: int | None = None
    cuda_graphs: bool = False
    weight_budget_mib: int | None = None

    def __post_init__(self) -> None:
        providers = get_args(Provider)
        _require(self.provider in providers, "provider", self.provider, f"one of {', '.join(providers)}")
        threads = self.num_threads
        _require(threads is None or (_is_int(threads) and threads >= 1), "num_threads", threads, "1 or more")
        size = self.image_cache_size
        _require(_is_int(size) and size >= 0, "image_cache_size", size, "0 (off) or more")
        chunk = self.prefill_chunk
        _require(chunk is None or (_is_int(chunk) and chunk >= 1), "prefill_chunk", chunk, "1 or more")
        budget = self.weight_budget_mib
        _require(budget is None or (_is_int(budget) and budget >= 0), "weight_budget_mib", budget, "0 or more")
        engines = self.backend == "tensorrt"
        _require(engines or not self.cuda_graphs, "cuda_graphs", self.cuda_graphs, "the backend 'tensorrt' with it")
        _require(engines or budget is None, "weight_budget_mib", budget, "the backend 'tensorrt' with it")


def _require(valid: bool, name: str, value: object, expected: str) -> None:
    if not valid:
        raise ConfigError(f"received {name} = {value!r}", expected=expected)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
