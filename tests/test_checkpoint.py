"""Checkpoints whose configuration cannot be exported are refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from promprune.errors import ModelError, UnsupportedModelError
from promprune.export import export_package
from promprune.export.checkpoint.loading import load_processor
from promprune.export.checkpoint.prompts import chat_template, prompt_text
from promprune.export.config import ExportConfig
from tests.support.tiny_models import CHAT_TEMPLATE, save_tiny_llava


@pytest.mark.parametrize(
    "changes", [{"text_config": 5}, {"vision_feature_layer": "x"}, {"text_config": {"max_position_embeddings": "4096"}}]
)
def test_values_of_a_wrong_type(tiny_llava: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    checkpoint = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="cannot be loaded as LlavaForConditionalGeneration"):
        export_package(ExportConfig(model=str(checkpoint), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("dynamic", {}),
        ("longrope", {"original_max_position_embeddings": 32, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}),
    ],
)
def test_rotary_frequencies_that_change_with_the_length(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0, **changes}
    checkpoint = save_tiny_llava(tmp_path / "checkpoint", text={"rope_parameters": rope})
    with pytest.raises(UnsupportedModelError, match=f"rope_type = '{kind}'"):
        export_package(ExportConfig(model=str(checkpoint), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_of_several_chat_templates_the_default_one_is_taken(tiny_llava: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint"))
    processor = AutoProcessor.from_pretrained(checkpoint)
    processor.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ raise_exception('not this one') }}"}
    processor.save_pretrained(checkpoint)
    loaded = load_processor(checkpoint)
    assert chat_template(loaded) == CHAT_TEMPLATE
    assert prompt_text(loaded, 3, "Why?") == "USER: <image>\nWhy? ASSISTANT:"
    config = ExportConfig(model=str(checkpoint), ratio=0.25, vision_only=True, verify=False, output=tmp_path / "out")
    assert (export_package(config).output / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_without_a_default_one_the_tokenizers_template_is_taken(tiny_llava: Path) -> None:
    processor = load_processor(tiny_llava)
    processor.chat_template, processor.tokenizer.chat_template = {"tool_use": "no"}, "plain"
    assert chat_template(processor) == "plain"
