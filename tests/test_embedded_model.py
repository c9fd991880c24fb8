"""The embedded model: complete files, loaded by plain transformers, answering far better than chance."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import promprune
from promprune.embedded.scenes import CALIBRATION_SEEDS, TEST_SEEDS, Question, Scene, questions, render_scene
from promprune.method.config import SelectionConfig
from promprune.method.entropy import spectral_entropy

transformers = pytest.importorskip("transformers")

FOLDER = Path(promprune.__file__).parent / "embedded" / "model"
SIZE_LIMIT_BYTES = 16 * 2**20
ACCURACY_FLOOR = 0.85


@lru_cache(maxsize=1)
def _model() -> tuple[Any, dict[str, Any]]:
    return transformers.LlavaForConditionalGeneration.from_pretrained(
        FOLDER, dtype=torch.float32, output_loading_info=True
    )


@lru_cache(maxsize=1)
def _processor() -> Any:
    return transformers.AutoProcessor.from_pretrained(FOLDER)


def _ask(scene: Scene, asked: list[Question]) -> list[str]:
    """Answers through the public interface: chat template, processor, generate."""
    model, processor = _model()[0], _processor()
    prompts = []
    for question in asked:
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        prompts.append(
            processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        )
    inputs = processor(images=[scene.image] * len(asked), text=prompts, padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def test_files_are_complete_and_small() -> None:
    expected = {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "promprune_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    found = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert expected <= set(found)
    assert sum(found.values()) <= SIZE_LIMIT_BYTES


def test_weights_are_in_the_hubs_layout() -> None:
    """Old key names and `rope_theta`, which both transformers 4.x and 5.x load without loss."""
    with safe_open(FOLDER / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        assert all(weights.get_tensor(name).dtype == torch.float16 for name in names)
    assert {name.split(".")[0] for name in names} == {"vision_tower", "multi_modal_projector", "language_model"}
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert "language_model.model.embed_tokens.weight" in names
    assert "language_model.lm_head.weight" in names
    assert "rope_theta" in json.loads((FOLDER / "config.json").read_text())["text_config"]


def test_transformers_loads_every_weight() -> None:
    _, report = _model()
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_prompt_has_one_token_per_patch() -> None:
    model, processor = _model()[0], _processor()
    scene = render_scene(TEST_SEEDS[0])
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the 7?"}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    assert prompt == "USER: <image>\nWhere is the 7? ASSISTANT:"
    inputs = processor(images=scene.image, text=prompt, return_tensors="pt")
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == patches
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id


def test_held_out_accuracy() -> None:
    """Far above what the majority answers reach (about 27 %), on one question of each type per scene."""
    right: Counter[bool] = Counter()
    for seed in TEST_SEEDS[:8]:
        scene = render_scene(seed)
        asked = questions(scene, per_type=1)
        for question, answer in zip(asked, _ask(scene, asked), strict=True):
            right[answer == question.answer] += 1
    assert right.total() >= 50
    assert right[True] / right.total() > ACCURACY_FLOOR


def test_calibration_fits_the_encoder() -> None:
    """mu is within the range of entropies of the calibration images, so that their budgets are split differently."""
    found = json.loads((FOLDER / "promprune_config.json").read_text())
    assert set(found) == {"mu", "tau", "saliency_ratio_max"}
    config = SelectionConfig(**found)
    model, processor = _model()[0], _processor()
    entropies = []
    for seed in CALIBRATION_SEEDS[:24]:
        pixels = processor.image_processor(render_scene(seed).image, return_tensors="pt")["pixel_values"]
        features = model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        entropies.append(spectral_entropy(features[0].detach().double()).item())
    below = sum(entropy < config.mu for entropy in entropies)
    assert 4 <= below <= 20
    assert 0.0 < config.tau < 0.2
