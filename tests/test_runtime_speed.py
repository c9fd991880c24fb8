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
from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers import LlavaProcessor as Processor

from promprune.config import ExportConfig
from promprune.export import export_package
from promprune.runtime import VisionLanguagePipeline
from tests.test_runtime_hugging_face import Reference, messages_of
from tests.tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, byte_tokenizer

PHOTOGRAPH = Path(skimage.__file__).parent / "data" / "astronaut.png"
QUESTION = "What is this?"
THREADS, NEW_TOKENS, RUNS = 2, 17, 3
VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
TEXT = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8, "num_attention_heads": 16}


def save_scaled_llava(folder: Path) -> Path:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=336, patch_size=14, projection_dim=256, **VISION)
    text = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + 256,
        num_key_value_heads=TEXT["num_attention_heads"],
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **TEXT,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=3)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    Processor(
        image_processor=images,
        tokenizer=byte_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def median_ms(action: Callable[[int], Any], new_tokens: int) -> float:
    """Return the median time of an answer of so many tokens, in milliseconds."""
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        action(new_tokens)
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def measured(action: Callable[[int], Any]) -> dict[str, float]:
    """Return time to first token and decoding rate of something that generates."""
    action(2)
    first, whole = median_ms(action, 1), median_ms(action, NEW_TOKENS)
    return {"first_token_ms": round(first, 1), "tokens_per_s": round((NEW_TOKENS - 1) / (whole - first) * 1000, 1)}


@pytest.mark.slow
def test_at_least_as_fast_as_hugging_face(tmp_path: Path) -> None:
    folder = save_scaled_llava(tmp_path / "model")
    reference = Reference(folder)
    reference.model.generation_config.eos_token_id = None
    torch.set_num_threads(THREADS)
    figures: dict[str, Any] = {}
    messages = messages_of(QUESTION, 1)
    for ratio in (0.12, 1.0):
        output = tmp_path / f"package-{ratio}"
        export_package(ExportConfig(model=str(folder), ratio=ratio, output=output, verify=False))
        with VisionLanguagePipeline.from_package(
            output, provider="cpu", num_threads=THREADS, image_cache_size=0
        ) as pipeline:
            pipeline._eos_token_ids = frozenset()
            ours = pipeline.generate(PHOTOGRAPH, QUESTION, max_new_tokens=NEW_TOKENS)
            kept = [np.asarray(ours.selection[0].token_indices)]
            theirs = reference.generate([PHOTOGRAPH], messages, kept, max_new_tokens=NEW_TOKENS)
            assert list(ours.token_ids) == theirs
            figures[f"promprune {ratio}"] = measured(
                lambda n, p=pipeline: p.generate(PHOTOGRAPH, QUESTION, max_new_tokens=n)
            )
            figures[f"Hugging Face {ratio}"] = measured(
                lambda n, k=kept: reference.generate([PHOTOGRAPH], messages, k, max_new_tokens=n)
            )
    shapes = {"vision": VISION, "text": TEXT, "threads": THREADS, "new_tokens": NEW_TOKENS, "runs": RUNS}
    print(json.dumps({**shapes, **figures}))
    for ratio in (0.12, 1.0):
        ours, theirs = figures[f"promprune {ratio}"], figures[f"Hugging Face {ratio}"]
        assert ours["first_token_ms"] <= theirs["first_token_ms"]
        assert ours["tokens_per_s"] >= theirs["tokens_per_s"]
    speedup = figures["Hugging Face 1.0"]["first_token_ms"] / figures["promprune 0.12"]["first_token_ms"]
    assert speedup >= 3
