"""Write a Qwen2.5-VL of 104 million random parameters that OpenVINO can convert too, and a square image.

    python scripts/benchmarks/make_random_qwen.py random-qwen

The image gives 576 visual tokens. The configuration has the keys of both transformers 5 and transformers 4; the latter
are needed by optimum-intel.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.tiny_models import QWEN_SPECIAL_TOKENS, save_tiny_qwen

ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
TOKENS = {"image_token_id": 3, "video_token_id": 261, "vision_start_token_id": 4, "vision_end_token_id": 5}
VISION = {
    "depth": 8,
    "hidden_size": 384,
    "num_heads": 6,
    "intermediate_size": 1024,
    "out_hidden_size": 768,
    "window_size": 112,
    "fullatt_block_indexes": [3, 7],
}
TEXT = {
    "vocab_size": len(QWEN_SPECIAL_TOKENS) + 256,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 4096,
    "rope_parameters": ROTARY,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write; the image is OUT.png")
    out: Path = parser.parse_args().out
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=False, **TOKENS)
    save_tiny_qwen(out, Qwen2_5_VLForConditionalGeneration(config))
    text = json.loads((out / "config.json").read_text())["text_config"]
    older = {"rope_scaling": {**ROTARY, "type": "mrope"}, "rope_theta": ROTARY["rope_theta"]}
    shared = {key: value for key, value in text.items() if key not in ("model_type", "dtype", "architectures")}
    change(out / "config.json", **shared, **older, **TOKENS, text_config={**text, **older})
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 576}
    processor = {"processor_class": "Qwen2_5_VLProcessor"}
    limits = {"min_pixels": pixels["shortest_edge"], "max_pixels": pixels["longest_edge"]}
    change(out / "preprocessor_config.json", size=pixels, **limits, **processor)
    change(out / "tokenizer_config.json", **processor)
    Image.effect_mandelbrot((672, 672), (-2, -1, 1, 1), 60).convert("RGB").save(f"{out}.png")


if __name__ == "__main__":
    main()
