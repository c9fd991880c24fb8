"""Settings of the runtime; the command line and the Python API both take their defaults from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Final, Literal, TypedDict, get_args

from promprune.errors import ConfigError
from promprune.runtime.sessions import BACKENDS

__all__ = ["DEFAULT_NEW_TOKENS", "GenerationConfig", "GenerationOptions", "Provider", "RuntimeConfig", "RuntimeOptions"]

Provider = Literal["auto", "cpu", "cuda", "tensorrt", "tensorrt-rtx"]
DEFAULT_NEW_TOKENS: Final = 256
_MOST: Final = 2**31 - 1  # that all backends can count to
_SHOWN_CHARACTERS: Final = 100


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
        stop: texts that end the answer; they are not part of it. One string, or a sequence of strings; kept as a tuple.
        seed: makes drawing reproducible; ``None`` draws a new seed each time.
        ignore_eos: go on after an end-of-sequence token, so that an answer has exactly the length that was asked for.

    Raises:
        ConfigError: a value is of another type, or out of its range.
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
        _check_integer(self, "max_new_tokens", least=1, optional=True)
        _check_number(self, "temperature", lambda value: value >= 0, "a number of 0 or more")
        _check_number(self, "top_p", lambda value: 0 < value <= 1, "a number in (0, 1]")
        _check_integer(self, "top_k", least=0)
        _check_number(self, "repetition_penalty", lambda value: value > 0, "a number above 0")
        texts = (self.stop,) if isinstance(self.stop, str) else self.stop
        valid = isinstance(texts, Sequence) and all(isinstance(text, str) and text for text in texts)
        _require(valid, "stop", self.stop, "a non-empty string, or a sequence of such")
        object.__setattr__(self, "stop", tuple(texts))
        _check_integer(self, "seed", least=0, most=None, optional=True)


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
        ConfigError: a value is of another type, or out of its range.
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
        _check_name(self, "backend", tuple(BACKENDS))
        _check_name(self, "provider", get_args(Provider))
        _check_integer(self, "num_threads", least=1, optional=True)
        _check_integer(self, "image_cache_size", least=0)
        _check_integer(self, "prefill_chunk", least=1, optional=True)
        _check_integer(self, "weight_budget_mib", least=0, optional=True)
        engines, budget = self.backend == "tensorrt", self.weight_budget_mib
        _require(engines or not self.cuda_graphs, "cuda_graphs", self.cuda_graphs, "the backend 'tensorrt' with it")
        _require(engines or budget is None, "weight_budget_mib", budget, "the backend 'tensorrt' with it")


def _check_integer(config: object, name: str, *, least: int, most: int | None = _MOST, optional: bool = False) -> None:
    """Require a field to be an integer, of Python or numpy, in a range; it is kept as Python's."""
    value = getattr(config, name)
    if optional and value is None:
        return
    _require(_is(Integral, value), name, value, "an integer")
    _require(value >= least, name, value, f"{least} or more")
    _require(most is None or value <= most, name, value, f"{most} or less")
    object.__setattr__(config, name, int(value))


def _check_number(config: object, name: str, valid: Callable[[float], bool], expected: str) -> None:
    """Require a field to be a finite real number, of Python or numpy, that is valid; it is kept as a float."""
    value = getattr(config, name)
    try:
        number = float(value) if _is(Real, value) else math.nan
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    _require(math.isfinite(number) and valid(number), name, value, expected)
    object.__setattr__(config, name, number)


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_name(config: object, name: str, names: Sequence[str]) -> None:
    value = getattr(config, name)
    _require(isinstance(value, str) and value in names, name, value, f"one of {', '.join(names)}")


def _require(valid: bool, name: str, value: object, expected: str) -> None:
    if not valid:
        raise ConfigError(f"received {name} = {_shown(value)}", expected=expected)


def _shown(value: object) -> str:
    """Return how Python writes a value, cut where that is long."""
    try:
        text = repr(value)
    except Exception:  # of integers with more digits than Python writes, and of strangers' classes
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
