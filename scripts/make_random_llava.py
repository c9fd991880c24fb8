"""Write a LLaVA of real proportions with random weights, for benchmarks: its speed is that of a trained one.

    python scripts/make_random_llava.py random-llava-1b --size 1b
    python scripts/make_random_llava.py random-llava-next-7b --size 7b --family llava_next --dtype float16

The vision tower is CLIP ViT-L/14-336 in every size (303 million parameters, 576 visual tokens). The tokenizer has
single bytes only, so a text is as many tokens as it has letters. Files, shards and keys are those of the checkpoints
on the hub. One tensor at a time is in memory.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from promprune.dtypes import BY_NUMPY
from tests.support.tiny_models import CHAT_TEMPLATE, byte_tokenizer

VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEXTS: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--size", choices=sorted(TEXTS), default="1b", help="of the language model (%(default)s)")
    parser.add_argument("--family", choices=sorted(FAMILIES), default="llava")
    parser.add_argument("--layers", type=int, help="of the language model, if not all: for the vision half alone")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--std", type=float, default=STD, help="standard deviation of the weights (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    changes = {} if given.layers is None else {"num_hidden_layers": given.layers}
    save(given.out, config_of(given.size, given.family, **changes), given.dtype, given.seed, std=given.std)


if __name__ == "__main__":
    main()
