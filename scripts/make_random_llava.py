"""Write a LLaVA of real proportions with random weights, for benchmarks: its speed is that of a trained one.

    python scripts/make_random_llava.py random-llava-1b --size 1b

The vision tower is CLIP ViT-L/14-336 in every size (303 million parameters, 576 visual tokens). The tokenizer has
single bytes only, so a text is as many tokens as it has letters.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.tiny_models import CHAT_TEMPLATE, byte_tokenizer

VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEXTS: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def config_of(size: str, **changes: int) -> LlavaConfig:
    """The configuration of a size; ``changes`` are of its language model."""
    text: dict[str, Any] = {**TEXTS[size], "vocab_size": 32064, "max_position_embeddings": 4096, **changes}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, projection_dim=768, **VISION),
        text_config=LlamaConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, **text),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_token_id=3,
    )


def processor_of() -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer=byte_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def save(folder: Path, config: LlavaConfig, dtype: str, seed: int) -> None:
    torch.manual_seed(seed)
    torch.set_default_dtype(getattr(torch, dtype))
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor_of().save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--size", choices=sorted(TEXTS), default="1b", help="of the language model (%(default)s)")
    parser.add_argument("--layers", type=int, help="of the language model, if not all: for the vision half alone")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    changes = {} if given.layers is None else {"num_hidden_layers": given.layers}
    save(given.out, config_of(given.size, **changes), given.dtype, given.seed)


if __name__ == "__main__":
    main()
