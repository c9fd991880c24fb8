"""Count the FLOPs up to the first token of models of every LLaVA family, in exported graphs.

    python scripts/benchmarks/count_flops.py

All layers of the language model are alike, so its graph is exported with one layer and with two layers of the real
width, and the difference is added for every further layer. The weights are random; 5 GB of memory are needed. The last
line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch
import transformers
from transformers import (
    GraniteConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    Qwen2Config,
    SiglipVisionConfig,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from promprune.export.families.llava import Llava
from promprune.export.families.llava_next import LlavaNext
from promprune.export.families.llava_onevision import LlavaOnevision
from promprune.export.graphs.decoder import decoder_graph
from promprune.export.graphs.selector import build_selector
from promprune.export.graphs.vision import encoder_graph
from promprune.export.roofline.work import count_work
from tests.support.random_llava import TEXTS, config_of, processor_of
from tests.support.tiny_models import byte_tokenizer

OPSET = 20
VOCABULARY = 32064  # LLaVA-1.5's in every model, to save memory: the head runs on one position only


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is counted of a model.

    Attributes:
        family: its class, which is given the model.
        config: makes its configuration, given the number of layers of its language model.
        processor: makes its processor.
        layers: layers of its language model.
        crops: crops of the image that is counted.
        keep: kept tokens per image.
    """

    family: type[Llava]
    config: Callable[[int], Any]
    processor: Callable[[], Any]
    layers: int
    crops: int
    keep: int


def onevision_config(layers: int) -> Any:
    text = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    return LlavaOnevisionConfig(text_config=text, image_token_index=3, video_token_index=4)


def granite_config(layers: int) -> Any:
    text = GraniteConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
    )
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=3,
        image_grid_pinpoints=CANVASES,
        vision_feature_layer=[-24, -20, -12, -1],
        vision_feature_select_strategy="full",
    )


def with_tokenizer(image_processor: Any) -> Any:
    return SimpleNamespace(image_processor=image_processor, tokenizer=byte_tokenizer())


CANVASES = [[384, 768], [768, 384], [768, 768], [384, 1152], [1152, 384]]
SIZE = {"height": 384, "width": 384}
# 12 % of the tokens are kept; of LLaVA-NeXT, the paper's 320.
MODELS = {
    "LLaVA-1.5-7B": Shape(
        family=Llava,
        config=lambda layers: config_of("7b", num_hidden_layers=layers),
        processor=processor_of,
        layers=TEXTS["7b"]["num_hidden_layers"],
        crops=1,
        keep=69,
    ),
    "LLaVA-NeXT-7B": Shape(
        family=LlavaNext,
        config=lambda layers: config_of("7b", "llava_next", num_hidden_layers=layers),
        processor=lambda: processor_of("llava_next"),
        layers=TEXTS["7b"]["num_hidden_layers"],
        crops=5,
        keep=320,
    ),
    "LLaVA-OneVision-7B": Shape(
        family=LlavaOnevision,
        config=onevision_config,
        processor=lambda: with_tokenizer(LlavaOnevisionImageProcessorPil()),
        layers=28,
        crops=10,
        keep=870,
    ),
    "Granite-Vision-3.3-2B": Shape(
        family=LlavaNext,
        config=granite_config,
        processor=lambda: with_tokenizer(
            LlavaNextImageProcessorPil(size=SIZE, crop_size=SIZE, image_grid_pinpoints=CANVASES)
        ),
        layers=40,
        crops=5,
        keep=435,
    ),
}


def small_family(shape: Shape, layers: int) -> Llava:
    config = shape.config(layers)
    torch.set_default_dtype(torch.float16)
    with torch.device("meta"):
        model = getattr(transformers, shape.family.model_class)(config)
    model.to_empty(device="cpu")
    torch.set_default_dtype(torch.float32)
    return shape.family(model.eval(), shape.processor())


class Counter:
    """Counts FLOPs in the graphs of one model."""

    def __init__(self, shape: Shape) -> None:
        self.layers = shape.layers
        self.families = [small_family(shape, layers) for layers in (1, 2)]
        self.decoders = [ir.to_proto(decoder_graph(family, opset=OPSET)) for family in self.families]
        self.vision_module = self.families[0].vision_modules[0]
        self.encoder = ir.to_proto(encoder_graph(self.vision_module, opset=OPSET))

    def prefill(self, tokens: int) -> int:
        sizes = {"batch_size": 1, "sequence_length": tokens, "past_sequence_length": 0, "total_sequence_length": tokens}
        one, two = (count_work(decoder, sizes).flops for decoder in self.decoders)
        return one + (self.layers - 1) * (two - one)

    def vision(self, crops: int) -> int:
        return count_work(self.encoder, {"batch_size": crops}).flops

    def selection(self, crops: int, keep: int) -> int:
        """Count the selection, which runs once per crop."""
        share, width = keep // crops, self.families[0].text_config.hidden_size
        selector = build_selector(self.vision_module.num_tokens, width, share, batch_size="batch_size")
        return count_work(selector, {"batch_size": crops}, loop_trips=share).flops


def count(shape: Shape, text: int) -> dict[str, Any]:
    """Count the FLOPs of one model with all tokens and with the kept ones."""
    counter, crops, keep = Counter(shape), shape.crops, shape.keep
    tokens = crops * counter.vision_module.num_tokens
    vision, selection = counter.vision(crops), counter.selection(crops, keep)
    full, pruned = counter.prefill(tokens + text), counter.prefill(keep + text)
    return {
        "visual_tokens": tokens,
        "vision_flops": vision,
        "selection_flops": selection,
        "prefill_flops": {tokens: full, keep: pruned},
        "prefill_change": pruned / full - 1,
        "whole_change": (vision + selection + pruned) / (vision + full) - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="models to count (default: all)")
    parser.add_argument("--text-tokens", type=int, default=60, help="text tokens of the prompt (%(default)s)")
    given = parser.parse_args()
    report: dict[str, Any] = {}
    print(f"TFLOP up to the first token, {given.text_tokens} text tokens\n")
    print("| | visual tokens | vision | selection | prefill | prefill's change | change of the whole |")
    print("|---|---|---|---|---|---|---|")
    for name in given.models or MODELS:
        counted = report[name] = count(MODELS[name], given.text_tokens)
        (tokens, full), (keep, pruned) = counted["prefill_flops"].items()
        vision, selection = counted["vision_flops"] / 1e12, counted["selection_flops"] / 1e12
        print(f"| {name} | {tokens} | {vision:.3f} | | {full / 1e12:.3f} | | |")
        changes = f"{counted['prefill_change']:+.1%} | {counted['whole_change']:+.1%}"
        print(f"| | {keep} | {vision:.3f} | {selection:.3f} | {pruned / 1e12:.3f} | {changes} |", flush=True)
    print(json.dumps({"text_tokens": given.text_tokens, **report}))


if __name__ == "__main__":
    main()
