"""Accuracy of the embedded model on held-out scenes: with all image tokens, with fewer, and with no image.

Run as `python scripts/evaluate_embedded_model.py`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from promprune.config import SelectionConfig
from promprune.scenes import (
    CALIBRATION_SEEDS,
    QUESTION_TYPES,
    TEST_SEEDS,
    TRAIN_SEEDS,
    Question,
    questions,
    render_scene,
)
from promprune.selection import select_tokens

from .calibration import read_calibration
from .data import EVENLY, IGNORE, make_batch, patch_labels
from .training import Trainer, packed_logits, vision_states

METHODS = ("all", "none", "random", "saliency", "coverage", "promprune")


@torch.inference_mode()
def packed_accuracy(trainer: Trainer, scenes: int) -> str:
    """Accuracy by type on scenes of the calibration split, all image tokens; what training prints now and then.

    An answer is right if every token of it, the end included, is the likeliest one: what greedy decoding gives.
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


@dataclass
class Answerer:
    """The saved checkpoint with its processor, as a user loads them."""

    model: Any
    processor: Any
    selection: SelectionConfig

    @classmethod
    def load(cls, folder: Path) -> Answerer:
        model = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        return cls(model, AutoProcessor.from_pretrained(folder), SelectionConfig(**read_calibration(folder)))

    def image_tokens(self, image: object) -> tuple[Tensor, Tensor]:
        """Projected features [N, D] of an image, and the CLS attention [N] of the layer they come from."""
        pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        tower, config = self.model.model.vision_tower, self.model.config
        output = tower(pixels, output_hidden_states=True, output_attentions=True)
        states = output.hidden_states[config.vision_feature_layer]
        attention = output.attentions[config.vision_feature_layer]
        return self.model.model.multi_modal_projector(states[:, 1:])[0], attention[0, :, 0, 1:].mean(0)

    def keep(self, method: str, features: Tensor, saliency: Tensor, keep_tokens: int, seed: int) -> Tensor | None:
        """What is left of the features, [K, D] in spatial order; None for no image at all."""
        if method == "none":
            return None
        if method == "all":
            return features
        if method == "random":
            order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
            return features[order[:keep_tokens].sort().values]
        config = replace(self.selection, policy=method)
        return features[select_tokens(features, saliency, keep_tokens, config).token_indices.sort().values]

    def answer(self, features: Tensor | None, asked: list[Question]) -> list[str]:
        """Greedy answers to questions about one image of which `features` [K, D] are left."""
        tokenizer, table = self.processor.tokenizer, self.model.get_input_embeddings()
        rows = []
        for question in asked:
            parts = [{"type": "image"}] if features is not None else []
            message = {"role": "user", "content": [*parts, {"type": "text", "text": question.text}]}
            prompt = self.processor.apply_chat_template([message], add_generation_prompt=True)
            before, _, after = prompt.partition("<image>")
            pieces = [table(torch.tensor(tokenizer(before).input_ids))]
            if features is not None:
                pieces += [features, table(torch.tensor(tokenizer(after, add_special_tokens=False).input_ids))]
            rows.append(torch.cat(pieces))
        length = max(map(len, rows))
        embeddings = torch.stack([torch.nn.functional.pad(row, (0, 0, length - len(row), 0)) for row in rows])
        mask = torch.stack([(torch.arange(length) >= length - len(row)).long() for row in rows])
        output = self.model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=6, do_sample=False)
        return [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]


def held_out(scenes: int, image_size: int) -> list[tuple[object, list[Question], int]]:
    """Image, one question of each type, and number of objects of the first scenes of the test split."""
    rendered = [render_scene(seed, image_size=image_size) for seed in TEST_SEEDS[:scenes]]
    return [(scene.image, questions(scene, per_type=1), len(scene.objects)) for scene in rendered]


def majority_answers(scenes: int = 1500) -> dict[str, str]:
    """The most frequent answer of each type in the training split."""
    found: dict[str, Counter[str]] = {kind: Counter() for kind in QUESTION_TYPES}
    for seed in TRAIN_SEEDS[:scenes]:
        for question in questions(render_scene(seed, image_size=32), per_type=1):
            found[question.type][question.answer] += 1
    return {kind: counts.most_common(1)[0][0] for kind, counts in found.items()}


@torch.inference_mode()
def score(answerer: Answerer, data: list[tuple[object, list[Question], int]], jobs: list[tuple[str, int]]) -> Scores:
    """Ask every question under each (method, tokens kept)."""
    scores = Scores({"all": Counter(), "none": Counter(), "majority": Counter()}, Counter(), Counter())
    majority = majority_answers()
    for seed, (image, asked, objects) in enumerate(data):
        features, saliency = answerer.image_tokens(image)
        for question in asked:
            scores.asked[question.type] += 1
            scores.count("majority", question, majority[question.type] == question.answer)
        crowd = "1-5" if objects <= 5 else "6-10" if objects <= 10 else "11-16"
        scores.crowds[crowd] += len(asked)
        for method, keep_tokens in jobs:
            kept = answerer.keep(method, features, saliency, keep_tokens, seed)
            name = method if method in ("all", "none") else f"{method} {keep_tokens}"
            for question, answer in zip(asked, answerer.answer(kept, asked), strict=True):
                right = answer == question.answer
                scores.count(name, question, right)
                scores.right.setdefault(name, Counter())[crowd] += right
    return scores


@dataclass
class Scores:
    """Right answers of each column, by question type (and by number of objects), and how many were asked."""

    right: dict[str, Counter[str]]
    asked: Counter[str]
    crowds: Counter[str]

    def count(self, column: str, question: Question, right: bool) -> None:
        self.right.setdefault(column, Counter())[question.type] += right

    def table(self) -> str:
        """Percent right, as a Markdown table."""
        total = self.asked.total()
        lines = ["| question | asked | " + " | ".join(self.right) + " |", "|---" * (2 + len(self.right)) + "|"]
        for kind in QUESTION_TYPES:
            cells = [f"{100 * right[kind] / max(self.asked[kind], 1):.1f}" for right in self.right.values()]
            lines.append(f"| {kind} | {self.asked[kind]} | " + " | ".join(cells) + " |")
        cells = [f"{100 * sum(right[k] for k in QUESTION_TYPES) / total:.1f}" for right in self.right.values()]
        lines.append(f"| **all** | {total} | " + " | ".join(f"**{cell}**" for cell in cells) + " |")
        for crowd, count in sorted(self.crowds.items(), key=lambda item: int(item[0].split("-")[0])):
            shares = [
                f"{100 * right[crowd] / count:.1f}" if column != "majority" else ""
                for column, right in self.right.items()
            ]
            lines.append(f"| {crowd} objects | {count} | " + " | ".join(shares) + " |")
        return "\n".join(lines)


@torch.inference_mode()
def saliency_auc(answerer: Answerer, scenes: int = 100) -> float:
    """How often a patch of an object gets more CLS attention than a patch of the background."""
    shares = []
    for seed in CALIBRATION_SEEDS[:scenes]:
        scene = render_scene(seed, image_size=answerer.model.config.vision_config.image_size)
        _, saliency = answerer.image_tokens(scene.image)
        is_object = torch.from_numpy(patch_labels(scene)[0][:, 0] > 0)
        higher = saliency[is_object][:, None] > saliency[~is_object][None, :]
        shares.append(higher.float().mean().item())
    return sum(shares) / len(shares)


def print_table(folder: Path, *, scenes: int, keep_tokens: tuple[int, ...] = ()) -> None:
    """Accuracy with all tokens, without the image, of the majority answer, and of each method at each budget."""
    answerer = Answerer.load(folder)
    data = held_out(scenes, answerer.model.config.vision_config.image_size)
    jobs = [("all", 0), ("none", 0)]
    jobs += [(method, keep) for keep in keep_tokens for method in METHODS[2:]]
    print(score(answerer, data, jobs).table(), flush=True)
    print(f"CLS attention, object against background patches: AUC {saliency_auc(answerer):.3f}")
