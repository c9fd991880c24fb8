"""Checkpoints that divide images into crops, in transformers, and the runtime's inputs to compare with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import skimage
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from promprune.method.reference import select_tokens
from promprune.runtime import VisionLanguagePipeline
from tests.support.tiny_models import CHAT_TEMPLATE, IMAGE_SIZE

DATA = Path(skimage.__file__).parent / "data"
# (width, height): every canvas, letterboxes of every kind, and shapes that no token or crop may be left of
SIZES = [
    (56, 56), (112, 112), (168, 56), (56, 168), (112, 56), (56, 112), (64, 48), (48, 64), (90, 110), (200, 150),
    (150, 40), (33, 200), (1, 1), (3, 1), (1, 3), (40, 1), (1, 40), (2000, 3), (3, 2000), (1, 5000), (5000, 1),
    (57, 55), (113, 111), (640, 480), (27, 91),
]  # fmt: skip
TOLERANCE = {"fp32": 2e-5, "fp16": 2e-2}  # of the largest difference, over the standard deviation
KEEP = 2


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A photograph in any shape, or noise if it would be tiny."""
    if min(size) < 8:
        values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        return Image.fromarray(values)
    name = ("chelsea.png", "coffee.png", "astronaut.png")[seed % 3]
    return Image.open(DATA / name).convert("RGB").resize(size)


def prefill(pipeline: VisionLanguagePipeline, requests: list[tuple[list[Image.Image], str]]) -> tuple[Any, Any, Any]:
    """Return inputs_embeds [batch, length, D], mask and logits [batch, V] of the runtime's first step."""
    made = [pipeline.request(*request) for request in requests]
    for request in made:
        request.images = [pipeline.encoder.encode(image)[0] for image in request.images]
    spliced = pipeline.language_model.splice([request.prompt for request in made])
    decoder = pipeline.language_model.decoder
    logits, _ = decoder.forward(spliced.embeds, decoder.caches.empty(len(made)), spliced.mask, spliced.positions)
    return np.asarray(spliced.embeds).astype(np.float32), spliced.mask, logits


def assert_close(found: np.ndarray, expected: np.ndarray, dtype: str) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE[dtype] * expected.std()


class CropsReference:
    """A checkpoint in transformers, with eager attention."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
        self.image_processor = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.patches = IMAGE_SIZE // self.model.config.vision_config.patch_size

    def ids(self, question: str, placeholders: list[int]) -> torch.Tensor:
        """Tokenize a question about images, with so many placeholders for each."""
        content = [*[{"type": "image"}] * len(placeholders), {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        template = self.tokenizer.chat_template or CHAT_TEMPLATE
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=True, tokenize=False
        )
        for count in placeholders:
            text = text.replace("<image>", "<IMAGE>" * count, 1)
        return self.tokenizer(text.replace("<IMAGE>", "<image>"), return_tensors="pt").input_ids

    def inputs(self, images: list[Image.Image], question: str) -> dict[str, torch.Tensor]:
        """Return the inputs of transformers' own model; several images as one list, so that they belong together."""
        if not images:
            return {"input_ids": self.ids(question, [])}
        values = self.image_processor(images=[images], return_tensors="pt")
        counts = [len(features) for features in self.model.get_image_features(**values).pooler_output]
        return {"input_ids": self.ids(question, counts), **values}

    @torch.no_grad()
    def whole(self, images: list[Image.Image], question: str) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs_embeds [length, D] and logits [V] of transformers' own path."""
        seen: list[torch.Tensor] = []
        hook = self.model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        logits = self.model(**self.inputs(images, question)).logits
        hook.remove()
        return seen[0][0].numpy(), logits[0, -1].numpy()

    @torch.no_grad()
    def pruned(self, images: list[Image.Image], question: str) -> tuple[np.ndarray, np.ndarray]:
        """The same with the tokens that the method in float64 chooses, crop by crop, in raster order of the image."""
        kept = [self.kept(image, alone=len(images) == 1) for image in images]
        ids = self.ids(question, [len(features) for features in kept])
        embeds = self.model.get_input_embeddings()(ids)
        if kept:
            embeds[ids == self.model.config.image_token_id] = torch.cat(kept)
        logits = self.model(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64)).logits
        return embeds[0].numpy(), logits[0, -1].numpy()

    def kept(self, image: Image.Image, *, alone: bool) -> torch.Tensor:
        values = self.image_processor(images=[[image] if alone else [image, image]], return_tensors="pt")
        tower = self.model.model.vision_tower(
            values["pixel_values"][0], output_attentions=True, output_hidden_states=True
        )
        layers = self.model.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else layers
        hidden = torch.cat([tower.hidden_states[layer] for layer in layers], dim=-1)
        features = self.model.model.multi_modal_projector(hidden)
        saliency = tower.attentions[-1].mean(dim=(1, 2))
        crops, tokens = saliency.shape
        order = torch.arange(tokens)
        if alone:
            size, n = (image.height, image.width), self.patches
            shape = get_anyres_image_grid_shape(size, self.model.config.image_grid_pinpoints, IMAGE_SIZE)
            numbers = torch.arange(tokens, crops * tokens).view(*shape, n, n, 1).permute(4, 0, 2, 1, 3)
            order = torch.cat([order, unpad_image(numbers.flatten(1, 2).flatten(2, 3), size).flatten()])
        mask = torch.zeros(crops * tokens, dtype=torch.bool).index_fill(0, order, True).view(crops, tokens)
        chosen = torch.zeros_like(mask)
        for crop in mask.any(dim=1).nonzero()[:, 0]:
            picks = select_tokens(features[crop].double(), saliency[crop].double(), KEEP, token_mask=mask[crop])
            chosen[crop, picks.token_indices] = True
        return features.flatten(0, 1)[order[chosen.flatten()[order]]]


def assert_all_ways_agree(
    pipeline: VisionLanguagePipeline, reference: CropsReference, batch: list[tuple[list[Image.Image], str]]
) -> None:
    """Compare a batch of requests with the pruned reference, and batched and streamed answers with those one by one."""
    embeds, _, logits = prefill(pipeline, batch)
    for row, (images, question) in enumerate(batch):
        expected, expected_logits = reference.pruned(images, question)
        assert_close(embeds[row, -len(expected) :], expected, "fp32")
        assert_close(logits[row], expected_logits, "fp32")
    one_by_one = [pipeline.generate(*request, max_new_tokens=10).token_ids for request in batch]
    assert [answer.token_ids for answer in pipeline.generate_batch(batch, max_new_tokens=10)] == one_by_one
    assert [pipeline.stream(*request, max_new_tokens=10).result.token_ids for request in batch] == one_by_one
