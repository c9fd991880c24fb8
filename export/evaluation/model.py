"""A checkpoint in torch that answers many questions under many selections.

Every image is encoded once. All questions about an image share the beginning of their prompts, including the kept
visual tokens, whose prefill also runs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Final

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from promprune.export.checkpoint.loading import Checkpoint
from promprune.export.checkpoint.prompts import prompt_text
from promprune.export.families import VisionReference
from promprune.runtime.images.encoded import TokenGrid

__all__ = ["KeptTokens", "TorchModel", "VisualTokens"]

_IMAGES_AT_ONCE: Final = 8
_PADDING: Final = -1
_Prompt = tuple[tuple[int, ...], list[int]]  # token ids before the image, and after it


@dataclass(frozen=True, kw_only=True, eq=False)
class VisualTokens:
    """All visual tokens of one image, crop by crop; models that do not divide images have one crop.

    Attributes:
        reference: the family's reference for the image.
        saliency: ``[crops, N]`` fp32.
        places: int64 ``[crops, N]``; index of each token among all tokens of the image, -1 for padding.
        grids: the grids over which the tokens are numbered.
        view: the part of the image that the model sees, RGB.
    """

    reference: VisionReference
    saliency: Tensor
    places: Tensor
    grids: tuple[TokenGrid, ...]
    view: Image.Image

    @property
    def features(self) -> Tensor:
        """Projector output, ``[crops, N, D]``."""
        return self.reference.features

    @property
    def token_mask(self) -> Tensor:
        """Bool ``[crops, N]``, false for padding."""
        return self.places != _PADDING

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the image, without padding."""
        return int(self.token_mask.sum())


@dataclass(frozen=True, eq=False)
class KeptTokens:
    """The features that replace the placeholders of an image in a prompt.

    Attributes:
        features: ``[placeholders, D]``.
        offsets: int64 ``[axes, placeholders]``, rotary positions relative to that at which the image begins.
        extent: distance from the beginning of the image to the text after it.
    """

    features: Tensor
    offsets: Tensor
    extent: int


class TorchModel:
    """Answers like transformers' greedy ``generate``, many questions at a time.

    For families with a choice of sizes, images are resized to the default grid.

    Args:
        checkpoint: the model.

    Attributes:
        num_tokens: N, the tokens that a selection chooses from; per crop, if images are divided into crops.

    Raises:
        UnsupportedModelError: the model cannot be exported.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.family = checkpoint.family(checkpoint.model, checkpoint.processor)
        self.num_tokens = self.family.vision_modules[0].num_tokens
        eos = checkpoint.model.generation_config.eos_token_id
        self._eos = frozenset(eos if isinstance(eos, list) else [eos])
        self._prompts: dict[tuple[str, bool], _Prompt] = {}

    @torch.inference_mode()
    def encode(self, image: Image.Image) -> VisualTokens:
        """Return all visual tokens of one image."""
        image, vision = self.family.resize(image), self.family.vision_modules[0]
        reference = self.family.reference(image)
        saliency = vision.module(*(reference.feeds[name] for name in vision.inputs))[1]
        tokens = self.family.image_tokens(image, reference)
        return VisualTokens(
            reference=reference, saliency=saliency, places=tokens.indices, grids=tokens.grids, view=tokens.view
        )

    def view(self, image: Image.Image) -> Image.Image:
        """Return the part of an image that the model sees, RGB."""
        return self.encode(image).view

    @torch.inference_mode()
    def keep(self, tokens: VisualTokens, token_indices: Tensor) -> KeptTokens:
        """Return some tokens of an image.

        Args:
            tokens: all tokens of the image.
            token_indices: int64 ``[T]``, in the order in which the language model receives them.
        """
        features = self.family.kept_features(tokens.reference, token_indices)
        image, text = self.family.image_token_id, self.checkpoint.processor.tokenizer("a").input_ids[-1]
        ids = torch.tensor([[image] * tokens.num_tokens + [text]])
        positions = self.family.position_ids(ids, tokens.reference)
        if positions is None:
            return KeptTokens(features, torch.arange(len(features))[None], len(features))
        return KeptTokens(features, positions[:, 0, token_indices], int(positions[0, 0, -1]))

    @torch.inference_mode()
    def answer(
        self, kept: Sequence[KeptTokens | None], questions: Sequence[Sequence[str]], max_new_tokens: int
    ) -> list[list[str]]:
        """Return greedy answers.

        Args:
            kept: for each image the features that replace its placeholders; None to ask without the image.
            questions: for each image at least one question.
            max_new_tokens: longest answer, in tokens.
        """
        axes = self.family.position_axes[0] if self.family.position_axes else 1
        nothing = KeptTokens(torch.empty(0, self.embeds.shape[1]), torch.empty(axes, 0, dtype=torch.int64), 0)
        rows = [nothing if one is None else one for one in kept]
        prompts = [
            [self._prompt(question, one is not None) for question in asked]
            for one, asked in zip(kept, questions, strict=True)
        ]
        alike = {i: (len(row.features), row.extent, prompts[i][0][0]) for i, row in enumerate(rows)}
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
        weight: Tensor = self.family.embed_tokens.weight  # type: ignore[assignment]
        return weight

    def _prompt(self, question: str, with_image: bool) -> _Prompt:
        key = question, with_image
        if key not in self._prompts:
            tokenizer, token_id = self.checkpoint.processor.tokenizer, self.family.image_token_id
            text = prompt_text(self.checkpoint.processor, self.family.image_token_id, question)
            if not with_image:
                token = tokenizer.convert_ids_to_tokens(token_id)
                text = text.replace(f"{token}\n", "").replace(token, "")
            ids = tokenizer(text).input_ids
            place = ids.index(token_id) if with_image else 1
            self._prompts[key] = tuple(ids[:place]), ids[place + with_image :]
        return self._prompts[key]

    def _answer_batch(
        self, kept: list[KeptTokens], prompts: list[list[_Prompt]], max_new_tokens: int
    ) -> list[list[str]]:
        """Answer all questions about images with the same number of tokens and the same beginning of the prompt."""
        ids = prompts[0][0][0]
        before = self.embeds[list(ids)].expand(len(kept), -1, -1)
        prefix = torch.cat([before, torch.stack([one.features for one in kept]).to(before.dtype)], dim=1)
        offsets = torch.stack([one.offsets for one in kept], dim=1)  # [axes, B, placeholders]
        text = torch.arange(len(ids)).expand(*offsets.shape[:2], -1)
        cache = DynamicCache()
        mask = torch.ones(prefix.shape[:2], dtype=torch.int64)
        self._forward(prefix, mask, torch.cat([text, len(ids) + offsets], dim=2), cache)
        rows = [(image, after) for image, asked in enumerate(prompts) for _, after in asked]
        cache.batch_select_indices(torch.tensor([image for image, _ in rows]))
        begin = torch.full((len(offsets), 1, 1), len(ids) + kept[0].extent)
        tokens = self._generate([after for _, after in rows], prefix.shape[1], begin, cache, max_new_tokens)
        texts = iter(self.checkpoint.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True))
        return [[next(texts).strip() for _ in asked] for asked in prompts]

    def _generate(
        self, rows: list[list[int]], read: int, begin: Tensor, cache: DynamicCache, max_new_tokens: int
    ) -> list[list[int]]:
        """Generate tokens after each row of ids, which are padded on the left and continue the KV cache.

        Args:
            rows: token ids of each row.
            read: number of tokens in the cache.
            begin: the position at which the rows begin, ``[axes, 1, 1]``.
            cache: KV cache with the same number of rows.
            max_new_tokens: most tokens to generate.
        """
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        own = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        before = torch.ones(len(rows), read, dtype=torch.int64)
        tokens: list[list[int]] = [[] for _ in rows]
        going = [True] * len(rows)
        for _ in range(max_new_tokens):
            positions = begin + (own.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            hidden = self._forward(self.embeds[ids], torch.cat([before, own], dim=1), positions, cache)
            chosen = self.family.lm_head(hidden[:, -1]).argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                going[row] = going[row] and token not in self._eos
                if going[row]:
                    tokens[row].append(token)
            if not any(going):
                break
            ids, own = chosen[:, None], torch.cat([own, torch.ones(len(rows), 1, dtype=torch.int64)], dim=1)
        return tokens

    def _forward(self, embeds: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """Run the language model at ``positions [axes, B, S]``."""
        hidden: Tensor = self.family.language_model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions if self.family.position_axes else positions[0],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden
