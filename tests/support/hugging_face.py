"""A LLaVA in transformers, to compare answers with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

DATA = Path(skimage.__file__).parent / "data"
PHOTOGRAPHS = [DATA / name for name in ("astronaut.png", "coffee.png", "rocket.jpg")]
QUESTIONS = ["What is this?", "How many cups are on the table, and which colour have they?", "héllo 世界"]


def messages_of(text: str, num_images: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]}]


class Reference:
    """The checkpoint in Hugging Face: processor, model, generate; image tokens kept as told."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = LlavaForConditionalGeneration.from_pretrained(folder).eval()

    @torch.no_grad()
    def generate(
        self, images: list[Path], messages: list[dict[str, Any]], kept: list[np.ndarray], **options: Any
    ) -> list[int]:
        """Drop the placeholders and features of the tokens that are not kept; then generate."""
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        opened = [Image.open(path) for path in images]
        inputs = self.processor(images=opened or None, text=text, return_tensors="pt")
        embeds = self.model.get_input_embeddings()(inputs["input_ids"])
        places = (inputs["input_ids"][0] == 3).nonzero()[:, 0]
        keep = torch.ones(embeds.shape[1], dtype=torch.bool)
        if images:
            features = self.model.model.get_image_features(inputs["pixel_values"]).pooler_output
            embeds[0, places] = torch.cat(list(features))
            keep[places] = False
            tokens = len(places) // len(images)
            keep[places[np.concatenate([index + n * tokens for n, index in enumerate(kept)])]] = True
        answer = self.model.generate(
            inputs_embeds=embeds[:, keep],
            attention_mask=torch.ones(1, int(keep.sum()), dtype=torch.int64),
            **{"do_sample": False, **options},
        )
        return answer[0].tolist()
