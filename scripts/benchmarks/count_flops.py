"""Count the FLOPs of LLaVA-1.5-7B and LLaVA-NeXT-7B up to the first token, in exported graphs.

    python scripts/benchmarks/count_flops.py

All layers of the language model are alike, so its graph is exported with one layer and with two layers of the real
width, and the difference is added for every further layer. The weights are random; 3 GB of memory are needed. The last
line on stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import onnx_ir as ir
import torch
from transformers import LlavaForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from promprune.export.families.llava import Llava
from promprune.export.graphs.decoder import decoder_graph
from promprune.export.graphs.selector import build_selector
from promprune.export.graphs.vision import encoder_graph
from promprune.export.roofline.work import count_work
from tests.support.random_llava import TEXTS, config_of, processor_of

OPSET = 20
# Crops per image, visual tokens per crop, and kept tokens per image: 12 %, and the paper's 320.
MODELS = {"LLaVA-1.5-7B": (1, 576, 69), "LLaVA-NeXT-7B": (5, 576, 320)}


def small_model(layers: int) -> LlavaForConditionalGeneration:
    torch.set_default_dtype(torch.float16)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config_of("7b", num_hidden_layers=layers))
    model.to_empty(device="cpu")
    torch.set_default_dtype(torch.float32)
    return model.eval()


class Counter:
    """Counts FLOPs in the graphs of a LLaVA whose language model has the shape of LLaVA-1.5-7B's."""

    def __init__(self) -> None:
        self.layers = TEXTS["7b"]["num_hidden_layers"]
        families = [Llava(small_model(layers), processor_of()) for layers in (1, 2)]
        self.decoders = [ir.to_proto(decoder_graph(family, opset=OPSET)) for family in families]
        self.encoder = ir.to_proto(encoder_graph(families[0].vision_modules[0], opset=OPSET))

    def prefill(self, tokens: int) -> int:
        sizes = {"batch_size": 1, "sequence_length": tokens, "past_sequence_length": 0, "total_sequence_length": tokens}
        one, two = (count_work(decoder, sizes).flops for decoder in self.decoders)
        return one + (self.layers - 1) * (two - one)

    def vision(self, crops: int) -> int:
        return count_work(self.encoder, {"batch_size": crops}).flops

    def selection(self, crops: int, tokens: int, keep: int) -> int:
        """Count the selection, which runs once per crop."""
        share = keep // crops
        selector = build_selector(tokens, TEXTS["7b"]["hidden_size"], share, batch_size="batch_size")
        return count_work(selector, {"batch_size": crops}, loop_trips=share).flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-tokens", type=int, default=60, help="text tokens of the prompt (%(default)s)")
    text = parser.parse_args().text_tokens
    counter, report = Counter(), {}
    print(f"TFLOP up to the first token, {text} text tokens\n")
    print("| | visual tokens | vision | selection | prefill | prefill's change | change of the whole |")
    print("|---|---|---|---|---|---|---|")
    for name, (crops, tokens, keep) in MODELS.items():
        vision, selection = counter.vision(crops), counter.selection(crops, tokens, keep)
        full, pruned = counter.prefill(crops * tokens + text), counter.prefill(keep + text)
        change, whole = pruned / full - 1, (vision + selection + pruned) / (vision + full) - 1
        print(f"| {name} | {crops * tokens} | {vision / 1e12:.3f} | | {full / 1e12:.3f} | | |")
        counted = f"{vision / 1e12:.3f} | {selection / 1e12:.3f} | {pruned / 1e12:.3f}"
        print(f"| | {keep} | {counted} | {change:+.1%} | {whole:+.1%} |")
        report[name] = {
            "vision_flops": vision,
            "selection_flops": selection,
            "prefill_flops": {crops * tokens: full, keep: pruned},
            "prefill_change": change,
            "whole_change": whole,
        }
    print(json.dumps({"text_tokens": text, **report}))


if __name__ == "__main__":
    main()
