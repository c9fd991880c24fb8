"""Checkpoints with the structure of public ones: a change of transformers or of this project that breaks one is seen.

The parts that are exported are compared with transformers without an export, which takes longer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from promprune.export import export_package
from promprune.export.checkpoint.loading import load_checkpoint
from promprune.export.checkpoint.prompts import prompt_text, refuse_unusable_template
from promprune.export.config import ExportConfig
from promprune.export.families import Family
from promprune.export.graphs.decoder import DecoderWithCache
from tests.support.hugging_face import PHOTOGRAPHS
from tests.support.public_checkpoints import PUBLIC


@pytest.fixture(scope="module", params=PUBLIC)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = PUBLIC[request.param](tmp_path_factory.mktemp("public") / "checkpoint")
    checkpoint = load_checkpoint(str(folder))
    return checkpoint.family(checkpoint.model, checkpoint.processor)


@torch.no_grad()
def test_features_and_saliency_are_those_of_transformers(family: Family) -> None:
    for path in PHOTOGRAPHS:
        reference = family.reference(family.resize(Image.open(path).convert("RGB")))
        module = next(vision for vision in family.vision_modules if vision.name == reference.graph)
        features, saliency = module.module(*(reference.feeds[name] for name in module.inputs))
        torch.testing.assert_close(features, reference.features, rtol=1e-4, atol=1e-4)
        if reference.saliency is not None:
            torch.testing.assert_close(saliency, reference.saliency, rtol=1e-4, atol=1e-6)


def test_a_question_about_an_image_has_one_placeholder(family: Family) -> None:
    refuse_unusable_template(family.processor, family.image_token_id)
    text = prompt_text(family.processor, family.image_token_id, "Which?")
    assert text.count(family.image_token) == 1
    assert text.count("Which?") == 1
    assert "'type'" not in text


@torch.no_grad()
def test_logits_are_those_of_transformers(family: Family) -> None:
    """The decoder as it is exported, called with embeddings, a cache and positions."""
    ids = torch.arange(10, 22)[None]
    embeds = family.embed_tokens(ids)
    positions = torch.arange(12).repeat(*family.position_axes, 1, 1)
    text = family.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    empty = [(torch.zeros(1, text.num_key_value_heads, 0, head_dim),) * 2 for _ in range(text.num_hidden_layers)]
    decoder = DecoderWithCache(family.language_model, family.lm_head)
    logits, _ = decoder(embeds, torch.ones(1, 12, dtype=torch.int64), positions, empty)
    expected: Any = family.model(input_ids=ids).logits
    torch.testing.assert_close(logits[:, 0], expected[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_half_precision_of_every_structure_is_verified(name: str, tmp_path: Path) -> None:
    folder = PUBLIC[name](tmp_path / "checkpoint")
    verification = export_package(
        ExportConfig(model=str(folder), dtype="fp16", ratio=0.25, output=tmp_path / "out")
    ).manifest.verification
    assert verification is not None
    assert verification.passed
    assert any(check.name == "kept tokens in common with fp32" for check in verification.checks)
