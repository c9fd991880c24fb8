"""Evaluation during training, on scenes of the calibration split; `promprune-eval` measures the final accuracy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from promprune.embedded.scenes import CALIBRATION_SEEDS, QUESTION_TYPES, render_scene
from promprune.export.checkpoint.loading import load_checkpoint
from promprune.export.evaluation.model import TorchModel

from .data import EVENLY, IGNORE, make_batch, patch_labels
from .training import Trainer, packed_logits, vision_states


@torch.inference_mode()
def packed_accuracy(trainer: Trainer, scenes: int) -> str:
    """Return the accuracy per question type with all image tokens, as text for the training log.

    An answer is right if each of its tokens, including the end, is the most likely one, as in greedy decoding.
    """
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for start in range(0, scenes, 8):
        seeds = CALIBRATION_SEEDS[-1 - start : -9 - start : -1]
        batch = make_batch([render_scene(s, image_size=trainer.image_size) for s in seeds], trainer.packer, EVENLY)
        words = trainer.model.model.multi_modal_projector(vision_states(trainer.model, batch.pixels)[:, 1:])
        logits, labels = packed_logits(trainer.model, trainer.packer, words, batch)
        wrong = torch.zeros(batch.labels.shape, dtype=torch.bool)
        wrong[batch.labels != IGNORE] = logits.argmax(-1) != labels
        for row, types in enumerate(batch.types):
            for number, kind in enumerate(types):
                asked[kind] += 1
                right[kind] += not bool(wrong[row, number].any())
    parts = [f"{kind} {right[kind] / max(asked[kind], 1):.2f}" for kind in QUESTION_TYPES]
    return f"{right.total() / asked.total():.3f} of {asked.total()}: " + ", ".join(parts)


def saliency_auc(folder: Path, scenes: int = 100) -> float:
    """Return how often a patch of an object gets more CLS attention than a patch of the background (AUC)."""
    model = TorchModel(load_checkpoint(str(folder)))
    side = model.checkpoint.meta_model.config.vision_config.image_size
    shares = []
    for seed in CALIBRATION_SEEDS[:scenes]:
        scene = render_scene(seed, image_size=side)
        saliency = model.encode(scene.image).saliency[0]
        is_object = torch.from_numpy(patch_labels(scene)[0][:, 0] > 0)
        higher = saliency[is_object][:, None] > saliency[~is_object][None, :]
        shares.append(higher.float().mean().item())
    return sum(shares) / len(shares)
