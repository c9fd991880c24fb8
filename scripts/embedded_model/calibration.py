"""Calibration of PromPrune's budget split on unlabelled images: mu and tau of this encoder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from promprune.prominence import spectral_entropy
from promprune.scenes import CALIBRATION_SEEDS, render_scene


@torch.inference_mode()
def write_calibration(folder: Path, images: int = 512) -> dict[str, float]:
    """Write `promprune_config.json`: mu is the images' median entropy, tau half its standard deviation."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    side = model.config.vision_config.image_size
    entropies = []
    for seed in CALIBRATION_SEEDS[:images]:
        pixels = processor.image_processor(render_scene(seed, image_size=side).image, return_tensors="pt")
        features = model.get_image_features(pixel_values=pixels["pixel_values"], return_dict=True).pooler_output
        entropies.append(float(spectral_entropy(features[0].double())))
    entropy = torch.tensor(entropies, dtype=torch.float64)
    found = {"mu": round(entropy.median().item(), 4), "tau": round(entropy.std().item() / 2, 4)}
    (folder / "promprune_config.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def read_calibration(folder: Path) -> dict[str, float]:
    """The mu and tau that `write_calibration` wrote."""
    found: dict[str, float] = json.loads((folder / "promprune_config.json").read_text(encoding="utf-8"))
    return found
