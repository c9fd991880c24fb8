"""LLaVAs of real proportions with random weights: their speed is that of a trained one.

The vision tower is CLIP ViT-L/14-336 in every size (303 million parameters, 576 visual tokens). The tokenizer has
single bytes only, so a text is as many tokens as it has letters. Files, shards and keys are those of the checkpoints
on the hub. One tensor at a time is in memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)

from promprune.dtypes import BY_NUMPY
from tests.support.tiny_models import CHAT_TEMPLATE, SPECIAL_TOKENS, byte_tokenizer

VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEXTS: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
}
SCALED_VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
SCALED_TEXT = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 8, "num_attention_heads": 16}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
SHARD_BYTES = 5_000_000_000
STD = 0.02
DTYPES = ("bfloat16", "float16", "float32")
HUB_PREFIXES = {  # of transformers' modules -> of the hub's keys
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.": "",
}


def config_of(size: str, family: str = "llava", **changes: int) -> Any:
    """The configuration of a size; ``changes`` are of its language model."""
    text: dict[str, Any] = {"vocab_size": 32064, "max_position_embeddings": 4096, **TEXTS[size], **changes}
    crops = {"image_grid_pinpoints": PINPOINTS} if family == "llava_next" else {}
    return FAMILIES[family][0](
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, projection_dim=768, **VISION),
        text_config=LlamaConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, **text),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_token_id=3,
        **crops,
    )


def processor_of(family: str = "llava") -> LlavaProcessor | LlavaNextProcessor:
    size: dict[str, Any] = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    if family == "llava_next":
        kind, images = LlavaNextProcessor, LlavaNextImageProcessorPil(image_grid_pinpoints=PINPOINTS, **size)
    else:
        kind, images = LlavaProcessor, CLIPImageProcessor(**size)
    return kind(
        image_processor=images,
        tokenizer=byte_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def save(folder: Path, config: Any, dtype: str, seed: int, *, std: float = STD) -> None:
    """Write the checkpoint: normal weights of the deviation ``std``, norms of 1, biases of 0."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = FAMILIES[config.model_type][1](config).to(getattr(torch, dtype))
    parameters = {hub_key(name): parameter for name, parameter in model.named_parameters()}
    norms = {hub_key(name) for name in norm_weights(model)}
    split = split_torch_state_dict_into_shards(
        parameters, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES
    )
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor_of(config.model_type).save_pretrained(folder)
    for file, keys in split.filename_to_tensors.items():
        write_shard(folder / file, {key: parameters[key] for key in keys}, norms, std)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def hub_key(name: str) -> str:
    old = next((prefix for prefix in HUB_PREFIXES if name.startswith(prefix)), "")
    return HUB_PREFIXES.get(old, "") + name.removeprefix(old)


def norm_weights(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name, module in model.named_modules() if "Norm" in type(module).__name__]


def write_shard(path: Path, parameters: Mapping[str, Tensor], norms: Sequence[str] | set[str], std: float) -> None:
    header, end = {}, 0
    for key, parameter in parameters.items():
        dtype = BY_NUMPY[str(parameter.dtype).removeprefix("torch.")].safetensors
        header[key] = {"dtype": dtype, "shape": list(parameter.shape), "data_offsets": [end, end + parameter.nbytes]}
        end += parameter.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for key, parameter in parameters.items():
            value = 1.0 if key in norms else 0.0 if key.endswith(".bias") else None
            values = torch.empty(parameter.shape)
            _ = values.normal_(std=std) if value is None else values.fill_(value)
            stream.write(values.to(parameter.dtype).view(torch.uint8).numpy().data)


def save_scaled_llava(folder: Path) -> Path:
    """Write a LLaVA of LLaVA-1.5-7B's proportions at about a sixtieth of its size; 576 visual tokens per image."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=336, patch_size=14, projection_dim=256, **SCALED_VISION)
    text = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + 256,
        num_key_value_heads=SCALED_TEXT["num_attention_heads"],
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **SCALED_TEXT,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=3)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor_of().save_pretrained(folder)
    return folder
