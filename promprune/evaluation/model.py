"""A checkpoint in torch, for many questions under many selections: every image is encoded once.

All questions about an image share the beginning of their prompt, the kept visual tokens included, so that is read
once too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from promprune.errors import UnsupportedModelError
from promprune.export.checkpoint import Checkpoint
from promprune.export.verify import prompt_text
from promprune.package import CropLayout
from promprune.runtime.results import TokenGrid

__all__ = ["TorchModel", "VisualTokens"]

_IMAGES_AT_ONCE: Final = 8
_Prompt = tuple[tuple[int, ...], list[int]]  # token ids before the image, and behind it


@dataclass(frozen=True)
class VisualTokens:
    """All visual tokens of one image.

    Attributes:
        features: ``[N, D]``, projector output.
        saliency: ``[N]`` fp32.
        view: what the model sees, RGB.
    """

    features: Tensor
    saliency: Tensor
    view: Image.Image


class TorchModel:
    """Answers as transformers' greedy ``generate`` does, many questions at a time.

    Args:
        checkpoint: the model; one whose images are one grid of visual tokens each.

    Attributes:
        grid: that grid.

    Raises:
        UnsupportedModelError: the model cuts images into crops, or its images have several sizes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.model = checkpoint.family.adapted(checkpoint.model, checkpoint.processor)
        layout = self.model.layout
        vision = self.model.vision_graphs[0]
        if not isinstance(layout, CropLayout) or vision.token_mask or self.model.position_axes:
            raise UnsupportedModelError(
                f"models of the family {checkpoint.family.model_type!r} are not evaluated in torch",
                expected="one whose images are one grid of visual tokens each",
                fix="export it at several ratios, and give those packages",
            )
        rows, columns = layout.patch_rows, layout.patch_columns
        self.grid = TokenGrid(rows=rows, columns=columns, left=0, top=0, width=layout.width, height=layout.height)
        self._vision = vision
        eos = checkpoint.model.generation_config.eos_token_id
        self._eos = frozenset(eos if isinstance(eos, list) else [eos])
        self._prompts: dict[tuple[str, bool], _Prompt] = {}

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> VisualTokens:
        """All visual tokens of one image."""
        reference = self.checkpoint.family.reference(
            self.checkpoint.model, self.checkpoint.processor, image, self.model
        )
        saliency = self._vision.module(*(reference.feeds[name] for name in self._vision.inputs))[1]
        return VisualTokens(reference.features[0], saliency[0], self._view(reference.feeds["pixel_values"][0]))

    @torch.inference_mode()
    def answer(
        self, kept: Sequence[Tensor | None], questions: Sequence[Sequence[str]], max_new_tokens: int
    ) -> list[list[str]]:
        """Greedy answers.

        Args:
            kept: of each image, what takes the place of its placeholders, ``[T, D]``; ``None`` to ask without it.
            questions: about each image, at least one.
            max_new_tokens: longest answer.
        """
        rows = [torch.empty(0, self.embeds.shape[1]) if one is None else one for one in kept]
        prompts = [
            [self._prompt(question, one is not None) for question in asked]
            for one, asked in zip(kept, questions, strict=True)
        ]
        alike = {i: (len(rows[i]), prompts[i][0][0]) for i in range(len(rows))}
        answers: list[list[str]] = [[] for _ in rows]
        for _, group in groupby(sorted(alike, key=alike.__getitem__), key=alike.__getitem__):
            members = list(group)
            for start in range(0, len(members), _IMAGES_AT_ONCE):
                part = members[start : start + _IMAGES_AT_ONCE]
                found = self._answer_batch([rows[i] for i in part], [prompts[i] for i in part], max_new_tokens)
                for i, texts in zip(part, found, strict=True):
                    answers[i] = texts
        return answers

    @cached_property
    def embeds(self) -> Tensor:
        """The table of the token embeddings, ``[vocabulary, D]``."""
        weight: Tensor = self.model.embed_tokens.weight  # type: ignore[assignment]
        return weight

    def _prompt(self, question: str, with_image: bool) -> _Prompt:
        key = question, with_image
        if key not in self._prompts:
            tokenizer, token_id = self.checkpoint.processor.tokenizer, self.model.image_token_id
            text = prompt_text(self.checkpoint, self.model, question)
            if not with_image:
                token = tokenizer.convert_ids_to_tokens(token_id)
                text = text.replace(f"{token}\n", "").replace(token, "")
            ids = tokenizer(text).input_ids
            place = ids.index(token_id) if with_image else 1
            self._prompts[key] = tuple(ids[:place]), ids[place + with_image :]
        return self._prompts[key]

    def _answer_batch(self, kept: list[Tensor], prompts: list[list[_Prompt]], max_new_tokens: int) -> list[list[str]]:
        """Answer all questions about images with equally many tokens and the same beginning of the prompt."""
        before = self.embeds[list(prompts[0][0][0])]
        prefix = torch.cat([before.expand(len(kept), -1, -1), torch.stack(kept).to(before.dtype)], dim=1)
        cache = DynamicCache()
        self._forward(prefix, torch.ones(prefix.shape[:2], dtype=torch.int64), cache)
        rows = [(image, after) for image, asked in enumerate(prompts) for _, after in asked]
        cache.batch_select_indices(torch.tensor([image for image, _ in rows]))
        tokens = self._generate([after for _, after in rows], prefix.shape[1], cache, max_new_tokens)
        texts = iter(self.checkpoint.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True))
        return [[next(texts).strip() for _ in asked] for asked in prompts]

    def _generate(self, rows: list[list[int]], read: int, cache: DynamicCache, max_new_tokens: int) -> list[list[int]]:
        """New tokens behind each row of ids, the rows being padded on the left, behind what the cache holds."""
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        own = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        mask = torch.cat([torch.ones(len(rows), read, dtype=torch.int64), own], dim=1)
        tokens: list[list[int]] = [[] for _ in rows]
        going = [True] * len(rows)
        for _ in range(max_new_tokens):
            hidden = self._forward(self.embeds[ids], mask, cache)
            chosen = self.model.lm_head(hidden[:, -1]).argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                going[row] = going[row] and token not in self._eos
                if going[row]:
                    tokens[row].append(token)
            if not any(going):
                break
            ids, mask = chosen[:, None], torch.cat([mask, torch.ones(len(rows), 1, dtype=torch.int64)], dim=1)
        return tokens

    def _forward(self, embeds: Tensor, mask: Tensor, cache: Any) -> Tensor:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
        hidden: Tensor = self.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return hidden

    def _view(self, pixel_values: Tensor) -> Image.Image:
        """What the model sees, from ``pixel_values [3, H, W]``."""
        described = self.checkpoint.processor.image_processor
        mean, std = (torch.tensor(values)[:, None, None] for values in (described.image_mean, described.image_std))
        pixels = ((pixel_values * std + mean) * 255).round().clamp(0, 255).byte()
        return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
