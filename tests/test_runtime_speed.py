"""Side by side with Hugging Face ``generate`` in PyTorch: same model, same kept tokens, same threads, one run.

``pytest -m slow -s tests/test_runtime_speed.py`` prints the figures. The model has LLaVA-1.5-7B's proportions at
about a sixtieth of its size: the language model has 21 times the parameters of the vision tower, and 576 visual
tokens meet a short question.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch

from promprune.export import export_package
from promprune.export.config import ExportConfig
from promprune.runtime import VisionLanguagePipeline
from tests.support.hugging_face import Reference, messages_of
from tests.support.random_llava import SCALED_TEXT, SCALED_VISION, save_scaled_llava

PHOTOGRAPH = Path(skimage.__file__).parent / "data" / "astronaut.png"
QUESTION = "What is this?"
THREADS, NEW_TOKENS, RUNS, PAUSE_S = 2, 17, 9, 0.05


def measured(actions: dict[str, Callable[[int], Any]]) -> dict[str, dict[str, float]]:
    """Return median time to first token and decoding rate of each.

    They are taken in turns, in an order that turns about from round to round, with a pause before each: the worker
    threads of the library that ran before spin for a while, and would slow down the one that follows.
    """
    first: dict[str, list[float]] = {name: [] for name in actions}
    rate: dict[str, list[float]] = {name: [] for name in actions}
    for run in range(RUNS + 1):
        for name in list(actions)[:: 1 if run % 2 else -1]:
            one, many = timed(actions[name], 1), timed(actions[name], NEW_TOKENS)
            if run:  # the first warms up
                first[name].append(one)
                rate[name].append((NEW_TOKENS - 1) / (many - one))
    return {
        name: {
            "first_token_ms": round(statistics.median(first[name]) * 1000, 1),
            "tokens_per_s": round(statistics.median(rate[name]), 1),
        }
        for name in actions
    }


def timed(action: Callable[[int], Any], count: int) -> float:
    time.sleep(PAUSE_S)
    start = time.perf_counter()
    action(count)
    return time.perf_counter() - start


@pytest.mark.slow
def test_at_least_as_fast_as_hugging_face(tmp_path: Path) -> None:
    folder = save_scaled_llava(tmp_path / "model")
    reference = Reference(folder)
    reference.model.generation_config.eos_token_id = None
    torch.set_num_threads(THREADS)
    messages = messages_of(QUESTION, 1)
    actions: dict[str, Callable[[int], Any]] = {}
    for ratio in (0.12, 1.0):
        output = tmp_path / f"package-{ratio}"
        export_package(ExportConfig(model=str(folder), ratio=ratio, output=output, verify=False))
        pipeline = VisionLanguagePipeline.from_package(output, provider="cpu", num_threads=THREADS, image_cache_size=0)
        pipeline._eos_token_ids = frozenset()
        kept = [np.asarray(pipeline.encode_image(PHOTOGRAPH).selection.token_indices)]

        def ours(count: int, pipeline: VisionLanguagePipeline = pipeline) -> list[int]:
            return list(pipeline.generate(PHOTOGRAPH, QUESTION, max_new_tokens=count).token_ids)

        def theirs(count: int, kept: list[np.ndarray] = kept) -> list[int]:
            return reference.generate([PHOTOGRAPH], messages, kept, max_new_tokens=count)

        assert ours(NEW_TOKENS) == theirs(NEW_TOKENS)
        actions |= {f"promprune {ratio}": ours, f"Hugging Face {ratio}": theirs}
    figures = measured(actions)
    shapes = {"vision": SCALED_VISION, "text": SCALED_TEXT, "threads": THREADS, "new_tokens": NEW_TOKENS, "runs": RUNS}
    print(json.dumps({**shapes, **figures}))
    for ratio in (0.12, 1.0):
        our, their = figures[f"promprune {ratio}"], figures[f"Hugging Face {ratio}"]
        assert our["first_token_ms"] <= their["first_token_ms"]
        assert our["tokens_per_s"] >= their["tokens_per_s"]
    speedup = figures["Hugging Face 1.0"]["first_token_ms"] / figures["promprune 0.12"]["first_token_ms"]
    assert speedup >= 3
