"""A Qwen2.5-VL in transformers, to compare answers with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from promprune.export.checkpoint.loading import load_checkpoint
from promprune.export.config import ExportConfig
from promprune.export.families.qwen2_5_vl import GridVisionEncoder
from promprune.method.config import SelectionConfig
from promprune.method.reference import select_tokens
from tests.support.tiny_models import QWEN_IMAGE

IMAGE_TOKEN_ID, NEW_TOKENS = 3, 12
RATIO = ExportConfig.ratio
Request = tuple[list[Image.Image], str]


@dataclass(frozen=True)
class Prompt:
    """One prompt as transformers reads it, every image with all its tokens."""

    input_ids: torch.Tensor  # [1, S]
    pixel_values: torch.Tensor | None
    grids: torch.Tensor | None  # [images, 3], in patches

    @property
    def inputs(self) -> dict[str, Any]:
        types = (self.input_ids == IMAGE_TOKEN_ID).int()
        images = {"pixel_values": self.pixel_values, "image_grid_thw": self.grids, "mm_token_type_ids": types}
        return {"input_ids": self.input_ids, **(images if self.grids is not None else {})}


class Reference:
    """The source model in transformers, fp32."""

    def __init__(self, folder: Path) -> None:
        self.model = load_checkpoint(str(folder)).model
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def prompt(self, request: Request) -> Prompt:
        images, question = request
        values = self.image_processor(images=images, return_tensors="pt") if images else {}
        grids = values.get("image_grid_thw")
        runs = [] if grids is None else [int(grid.prod()) // 4 for grid in grids]
        image = "".join(QWEN_IMAGE.replace("<|image_pad|>", "<|image_pad|>" * count) for count in runs)
        text = f"<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n"
        return Prompt(self.tokenizer(text, return_tensors="pt").input_ids, values.get("pixel_values"), grids)

    def logits(self, request: Request) -> np.ndarray:
        return self._last_logits(self.prompt(request).inputs)

    def pruned_logits(self, request: Request) -> np.ndarray:
        return self._last_logits(self.pruned(self.prompt(request))[0])

    @torch.no_grad()
    def _last_logits(self, inputs: dict[str, Any]) -> np.ndarray:
        return self.model(**inputs).logits[0, -1].numpy()

    def answer(self, **inputs: Any) -> list[int]:
        given = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        tokens = self.model.generate(
            **inputs,
            attention_mask=torch.ones(next(iter(inputs.values())).shape[:2], dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        return tokens[0, given:].tolist()

    @torch.no_grad()
    def pruned(self, prompt: Prompt) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
        """Embeddings and positions of a prompt with the tokens that the float64 method keeps, and which these are."""
        embeds = self.model.get_input_embeddings()(prompt.input_ids)
        stays, chosen = prompt.input_ids[0] != IMAGE_TOKEN_ID, []
        positions = torch.arange(embeds.shape[1]).expand(3, 1, -1)
        if prompt.grids is not None:
            types = (prompt.input_ids == IMAGE_TOKEN_ID).int()
            positions, _ = self.model.model.get_rope_index(prompt.input_ids, types, image_grid_thw=prompt.grids)
            features = self.model.get_image_features(prompt.pixel_values, prompt.grids, return_dict=True).pooler_output
            embeds[prompt.input_ids == IMAGE_TOKEN_ID] = torch.cat(list(features))
            places = (~stays).nonzero()[:, 0]
            patches = prompt.pixel_values.split(prompt.grids.prod(dim=1).tolist())
            for row, values, grid in zip(features, patches, prompt.grids.tolist(), strict=True):
                kept = select_tokens(
                    row.double(), self.saliency(values, grid).double(), round(RATIO * len(row)), SelectionConfig()
                ).token_indices
                stays[places[: len(row)][kept]] = True
                chosen.append(sorted(kept.tolist()))
                places = places[len(row) :]
        return {"inputs_embeds": embeds[:, stays], "position_ids": positions[..., stays]}, chosen

    def saliency(self, values: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
        encoder = GridVisionEncoder(
            self.model.model.visual, rows=grid[1] // 2, columns=grid[2] // 2, window=2, full_blocks=[0, 1]
        )
        return encoder(values[None])[1][0]
