"""Checkpoints whose configuration cannot be exported are refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from promprune.errors import ModelError, UnsupportedModelError
from promprune.export import export_package
from promprune.export.checkpoint.loading import load_checkpoint, load_processor
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


def with_config(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    """Copy a checkpoint and change its configuration."""
    copy = Path(shutil.copytree(checkpoint, folder / "changed"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


@pytest.mark.parametrize("token_id", [-200, 9999])
def test_a_placeholder_that_the_tokenizer_lacks(tiny_llava: Path, tmp_path: Path, token_id: int) -> None:
    checkpoint = with_config(tiny_llava, tmp_path, image_token_id=token_id, image_token_index=token_id)
    with pytest.raises(ModelError, match=f"has {token_id} as its image token .* lacks; expected .*: 3; correct"):
        load_checkpoint(str(checkpoint))


def test_a_template_that_shows_no_image_is_refused_before_the_export(tiny_llava: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint"))
    (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}")
    with pytest.raises(UnsupportedModelError, match=r"cannot render .*it writes 0 image placeholders for 1 image"):
        export_package(ExportConfig(model=str(checkpoint), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_template_that_takes_texts_gets_texts(tiny_llava: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint"))
    template = "{% for m in messages %}{{ m.role + '|' + m.content + '|' }}{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(template)
    assert prompt_text(load_processor(checkpoint), 3, "Why?") == "user|<image>\nWhy?|"


def test_the_original_llava_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava", "mm_vision_tower": "openai/clip"}')
    with pytest.raises(UnsupportedModelError, match=r"original LLaVA code .*such as llava-hf/llava-1.5-7b-hf"):
        load_checkpoint(str(tmp_path))


def test_another_vision_tower_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava", "vision_config": {"model_type": "pixtral"}}')
    with pytest.raises(UnsupportedModelError, match="has a 'pixtral' vision tower; expected 'clip_vision_model' or"):
        load_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_model.safetensors"], "has the weights of an adapter .* merge the adapter into its base model"),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            "but no model.safetensors.index.json; .* download model.safetensors.index.json too",
        ),
        (["llava.safetensors"], "has llava.safetensors, but .*; rename the file to model.safetensors"),
    ],
)
def test_weights_that_are_not_a_models(tiny_llava: Path, tmp_path: Path, files: list[str], message: str) -> None:
    checkpoint = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint"))
    content = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").unlink()
    for name in files:
        (checkpoint / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_checkpoint(str(checkpoint))


def test_an_adapter_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is a LoRA adapter .* merge it into its base model"):
        load_checkpoint(str(tmp_path))


def test_an_adapter_that_is_not_merged_is_named(tiny_llava: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    key = next(key for key in tensors if key.endswith("q_proj.weight"))
    prefix = key.removesuffix(".weight")
    tensors[f"{prefix}.base_layer.weight"] = tensors.pop(key)
    tensors[f"{prefix}.lora_A.default.weight"] = torch.zeros(2, 4)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(ModelError, match=r"LoRA adapter that is not merged, such as .*lora_A"):
        load_checkpoint(str(checkpoint))


def test_a_sentencepiece_tokenizer_alone_is_named(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint"))
    (checkpoint / "tokenizer.json").rename(checkpoint / "tokenizer.model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"has tokenizer.model, but no tokenizer.json; .*; pip install sentencepiece"):
        load_processor(checkpoint)
