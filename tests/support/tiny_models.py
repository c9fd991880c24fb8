"""Tiny random checkpoints of the real architectures, saved in Hugging Face format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

IMAGE_SIZE = 56
PATCH_SIZE = 14
NUM_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<image>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{{ ' ' }}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_SPECIAL_TOKENS = ["<pad>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]
QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + QWEN_IMAGE + "' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(
    special_tokens: list[str] = SPECIAL_TOKENS, *, bos: str | None = "<s>", eos: str = "</s>"
) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes plus the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special_tokens, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special_tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token="<pad>", model_max_length=256
    )


# Of the keys that this version of transformers writes -> those of the checkpoints on the hub, and of its own modules.
HUB_PREFIXES = {"vision_tower.": "vision_tower.vision_model."}
MODULE_PREFIXES = {
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


def clip_config(**changes: Any) -> CLIPVisionConfig:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "projection_dim": 32,
    }
    return CLIPVisionConfig(**{**settings, **changes})


def text_config(config_class: Any = LlamaConfig, **changes: Any) -> Any:
    settings = {
        "vocab_size": len(SPECIAL_TOKENS) + 256,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return config_class(**{**settings, **changes})


def llava_config(
    *, vision: Mapping[str, Any] = MappingProxyType({}), text: Mapping[str, Any] = MappingProxyType({}), **changes: Any
) -> LlavaConfig:
    """A configuration; ``vision`` and ``text`` change those of its parts."""
    settings = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "image_token_id": 3, **changes}
    return LlavaConfig(vision_config=clip_config(**vision), text_config=text_config(**text), **settings)


def randomised(model_class: Any, config: Any, seed: int) -> Any:
    """A model with random weights, larger than the default, so that different tokens get different answers."""
    torch.manual_seed(seed)
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def _processor(kind: Any, image_processor: Any, *, cls_tokens: int = 1) -> Any:
    """The processor of a LLaVA whose tower has so many tokens that are no patches; they are left out."""
    return kind(
        image_processor=image_processor,
        tokenizer=byte_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default" if cls_tokens else "full",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=cls_tokens,
    )


def save_tiny_llava(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a random LLaVA of about 60 thousand parameters; 16 visual tokens per image."""
    randomised(LlavaForConditionalGeneration, llava_config(**changes), seed).to(dtype).save_pretrained(folder)
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    _processor(LlavaProcessor, image_processor).save_pretrained(folder)
    return folder


SIGLIP_IMAGE_SIZE = 58  # no multiple of the patches, as in the real tower of 384 pixels


def save_tiny_siglip_llava(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random LLaVA with a SigLIP tower and a Qwen2, as llava-interleave has them; 16 visual tokens."""
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIGLIP_IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    settings = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_token_id": 3, **changes}
    text = tiny_language_model("qwen2", tie_word_embeddings=True)
    config = LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, **settings)
    randomised(LlavaForConditionalGeneration, config, seed).save_pretrained(folder)
    _processor(
        LlavaProcessor,
        SiglipImageProcessorPil(size={"height": SIGLIP_IMAGE_SIZE, "width": SIGLIP_IMAGE_SIZE}),
        cls_tokens=0,
    ).save_pretrained(folder)
    return folder


PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def save_tiny_llava_next(
    folder: Path,
    *,
    seed: int = 0,
    text: Any = None,
    preprocessor: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a random LLaVA-NeXT with crops of 16 visual tokens.

    Args:
        folder: to write.
        seed: seed of the weights.
        text: configuration of the language model; a Llama by default.
        preprocessor: what differs in its image processor.
        changes: to the model's configuration.
    """
    config = LlavaNextConfig(
        vision_config=clip_config(),
        text_config=text or tiny_language_model(),
        **{"image_grid_pinpoints": PINPOINTS, "image_token_index": 3, **changes},
    )
    randomised(LlavaNextForConditionalGeneration, config, seed).save_pretrained(folder)
    crops = {
        "size": {"shortest_edge": IMAGE_SIZE},
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_grid_pinpoints": PINPOINTS,
    }
    _processor(LlavaNextProcessor, LlavaNextImageProcessorPil(**{**crops, **(preprocessor or {})})).save_pretrained(
        folder
    )
    return folder


def siglip_config(**changes: Any) -> SiglipVisionConfig:
    settings = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "vision_use_head": False,
    }
    return SiglipVisionConfig(**{**settings, **changes})


ONEVISION_PINPOINTS = [[56, 56], [56, 112], [112, 56], [112, 112], [168, 112], [56, 168]]


def save_tiny_llava_onevision(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random LLaVA-OneVision with crops of 16 visual tokens; images of more than two crops are shrunk."""
    config = LlavaOnevisionConfig(
        vision_config=siglip_config(),
        text_config=tiny_language_model("qwen2", tie_word_embeddings=True),
        tie_word_embeddings=True,
        **{
            "image_grid_pinpoints": ONEVISION_PINPOINTS,
            "image_token_index": 3,
            "video_token_index": 4,
            "vision_aspect_ratio": "anyres_max_2",
            **changes,
        },
    )
    randomised(LlavaOnevisionForConditionalGeneration, config, seed).save_pretrained(folder)
    LlavaOnevisionImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_grid_pinpoints=ONEVISION_PINPOINTS
    ).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


GRANITE_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def save_tiny_granite_vision(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a random Granite Vision: a LLaVA-NeXT with SigLIP, the features of several layers, and a Granite."""
    text = text_config(
        GraniteConfig,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        embedding_multiplier=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        logits_scaling=4.0,
    )
    config = LlavaNextConfig(
        vision_config=siglip_config(),
        text_config=text,
        tie_word_embeddings=True,
        **{
            "image_grid_pinpoints": PINPOINTS,
            "image_token_index": 3,
            "vision_feature_layer": [-4, -2, -1],
            "vision_feature_select_strategy": "full",
            **changes,
        },
    )
    randomised(LlavaNextForConditionalGeneration, config, seed).save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size=size,
            crop_size=size,
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.5, 0.5, 0.5],
            image_grid_pinpoints=PINPOINTS,
        ),
        tokenizer=byte_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        chat_template=GRANITE_CHAT_TEMPLATE,
        num_additional_image_tokens=0,
    ).save_pretrained(folder)
    return folder


def tiny_language_model(kind: str = "llama", **changes: Any) -> Any:
    """Configuration of a language model that LLaVA-NeXT checkpoints have: "llama", "mistral" or "qwen2"."""
    classes = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
    return text_config(classes[kind], **{"max_position_embeddings": 1024, **changes})


def reshape_checkpoint(
    source: Path,
    folder: Path,
    *,
    shards: int = 1,
    prefixes: Mapping[str, str] = MappingProxyType({}),
    hub: bool = False,
) -> Path:
    """Write a checkpoint in another form: in shards, with other prefixes of its keys, or like a hub cache."""
    target = folder / "snapshot"
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    tensors = {_renamed(key, prefixes): value for key, value in tensors.items()}
    names = sorted(tensors)
    files = [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]
    files = ["model.safetensors"] if shards == 1 else files
    weight_map = {name: files[index * shards // len(names)] for index, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, target / file)
    if shards > 1:
        (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if hub:
        (folder / "blobs").mkdir()
        for index, path in enumerate(sorted(target.iterdir())):
            path.rename(folder / "blobs" / str(index))
            path.symlink_to(Path("..") / "blobs" / str(index))
    return target


def _renamed(key: str, prefixes: Mapping[str, str]) -> str:
    old = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
    return prefixes.get(old, "") + key.removeprefix(old)


def _qwen_text(tie_word_embeddings: bool) -> dict[str, Any]:
    return {
        "vocab_size": len(QWEN_SPECIAL_TOKENS) + 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": tie_word_embeddings,
    }


def _qwen_tokens() -> dict[str, int]:
    return {"image_token_id": 3, "video_token_id": 261, "vision_start_token_id": 4, "vision_end_token_id": 5}


def tiny_qwen2_5_vl(*, seed: int = 0, **vision: Any) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL: two blocks with full attention, one with windows of 2 x 2 tokens (28 x 28 pixels each)."""
    tower = {
        "depth": 3,
        "hidden_size": 32,
        "num_heads": 4,
        "intermediate_size": 48,
        "out_hidden_size": 64,
        "window_size": 56,
        "fullatt_block_indexes": [0, 1],
        **vision,
    }
    config = Qwen2_5_VLConfig(
        text_config=_qwen_text(False), vision_config=tower, tie_word_embeddings=False, **_qwen_tokens()
    )
    return randomised(Qwen2_5_VLForConditionalGeneration, config, seed).eval()


def tiny_qwen2_vl(*, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """A random Qwen2-VL, its word embeddings tied as in the real 2B model."""
    tower = {"depth": 3, "embed_dim": 32, "num_heads": 4, "mlp_ratio": 2, "hidden_size": 64}
    config = Qwen2VLConfig(
        text_config=_qwen_text(True), vision_config=tower, tie_word_embeddings=True, **_qwen_tokens()
    )
    return randomised(Qwen2VLForConditionalGeneration, config, seed).eval()


def save_tiny_qwen(folder: Path, model: Any, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a Qwen2-VL or Qwen2.5-VL as its makers do: an image processor, a tokenizer, a chat template."""
    model.to(dtype).save_pretrained(folder)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}).save_pretrained(folder)
    tokenizer = byte_tokenizer(QWEN_SPECIAL_TOKENS, bos=None, eos="<|im_end|>")
    tokenizer.chat_template = QWEN_CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
