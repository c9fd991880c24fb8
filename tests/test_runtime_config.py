"""The runtime's settings: accepted values and their conversion, and refusals in one line."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from promprune.errors import ConfigError
from promprune.runtime import GenerationConfig, RuntimeConfig, VisionLanguagePipeline, pipeline
from promprune.runtime.engine.sampling import probabilities_of


class Unwritable:
    def __repr__(self) -> str:
        raise RuntimeError


HUGE = 10**5000  # more digits than Python writes
NOT_INTEGERS = [1.5, "3", True, np.True_, np.float32(3), [3], -HUGE, -1, np.int64(-1), np.ones(2), Unwritable()]
NOT_NUMBERS = [
    None,
    "1",
    [1],
    True,
    1j,
    HUGE,
    -HUGE,
    math.inf,
    math.nan,
    -1,
    np.float32("nan"),
    Fraction(HUGE),
    np.ones(2),
]


def refused(kind: type[GenerationConfig | RuntimeConfig], name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"received {name} = ") as caught:
        kind(**{name: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("value", NOT_INTEGERS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (GenerationConfig, "max_new_tokens"),
        (GenerationConfig, "top_k"),
        (GenerationConfig, "seed"),
        (RuntimeConfig, "num_threads"),
        (RuntimeConfig, "image_cache_size"),
        (RuntimeConfig, "prefill_chunk"),
    ],
)
def test_what_is_no_integer_in_range_is_refused(kind: type[Any], name: str, value: Any) -> None:
    refused(kind, name, value)
    if name != "seed":
        refused(kind, name, HUGE)
        refused(kind, name, 2**31)


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty"])
def test_what_is_no_number_in_range_is_refused(name: str, value: Any) -> None:
    refused(GenerationConfig, name, value)


@pytest.mark.parametrize("value", [None, 5, "", b"x", [""], [3], [None], {"a"}, iter(["a"]), {"a": 1}])
def test_what_is_no_stop_text_is_refused(value: Any) -> None:
    refused(GenerationConfig, "stop", value)


@pytest.mark.parametrize("value", [None, 5, ["onnxruntime"], "abacus", "", np.ones(2)])
@pytest.mark.parametrize("name", ["backend", "provider"])
def test_unknown_backends_and_providers_are_refused_before_the_package_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    refused(RuntimeConfig, name, value)
    monkeypatch.setattr(pipeline, "read_package", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ConfigError, match=name):
        VisionLanguagePipeline.from_package(tmp_path, **{name: value})


def test_numbers_of_numpy_are_kept_as_pythons() -> None:
    config = GenerationConfig(
        max_new_tokens=np.int64(5),
        temperature=np.float32(0.5),
        top_p=np.float16(0.5),
        top_k=np.uint8(2),
        repetition_penalty=Fraction(3, 2),  # type: ignore[arg-type]
        seed=np.uint64(2**64 - 1),
        stop="x",
        timeout_s=np.float32(9),
    )
    assert config == GenerationConfig(
        max_new_tokens=5,
        temperature=0.5,
        top_p=0.5,
        top_k=2,
        repetition_penalty=1.5,
        seed=2**64 - 1,
        stop=["x"],
        timeout_s=9,
    )
    kinds = [type(value) for value in vars(config).values()]
    assert kinds == [int, float, float, int, float, tuple, int, float, bool]
    assert RuntimeConfig(num_threads=np.int32(2)).num_threads == 2
    logits = np.array([0, 1, 2, 3], np.float32)
    np.testing.assert_array_equal(probabilities_of(logits, config) > 0, [False, False, False, True])
