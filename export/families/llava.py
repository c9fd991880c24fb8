"""LLaVA-1.5 and similar models: a vision tower (CLIP or SigLIP), an MLP projector, a decoder-only language model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from promprune.errors import UnsupportedModelError
from promprune.export.families.base import Family, ImageTokens, SampleInput, VisionModule, VisionReference, single_grid
from promprune.export.families.towers.table import TOWERS, feature_layers, vision_encoder
from promprune.package.image import AnyresLayout, CropLayout

__all__ = ["Llava"]


class Llava(Family):
    """LLaVA: a square image is one crop, whose patches are the visual tokens."""

    model_type = "llava"
    model_class = "LlavaForConditionalGeneration"
    towers: ClassVar[Collection[str]] = tuple(TOWERS)

    def build_vision_modules(self) -> tuple[VisionModule, ...]:
        """Return the tower and the projector."""
        side, patches = self.side, self.patches
        pixel_values = SampleInput(sample=torch.zeros(2, 3, side, side), dims={0: "batch_size"})
        self.refuse_tower(self.config.vision_config.model_type)
        encoder = vision_encoder(self.model)
        return (VisionModule(module=encoder, inputs={"pixel_values": pixel_values}, num_tokens=patches**2),)

    def build_layout(self) -> CropLayout | AnyresLayout:
        """Return a square crop; refuse preprocessing with a different crop."""
        side, patches = self.side, self.patches
        self.refuse_other_size("images", "set crop_size in its preprocessor_config.json")
        return CropLayout(height=side, width=side, patch_rows=patches, patch_columns=patches)

    @property
    def sample_sizes(self) -> tuple[tuple[int, int], ...]:
        """The size of the crop."""
        return ((self.side, self.side),)

    def reference(self, image: Image.Image) -> VisionReference:
        """Preprocess and encode one image with transformers."""
        pixel_values = self.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        features, saliency = self.encode_with_saliency(
            lambda: torch.stack(list(self.model.get_image_features(pixel_values, return_dict=True).pooler_output))
        )
        return VisionReference(feeds={"pixel_values": pixel_values}, features=features, saliency=saliency)

    def image_tokens(self, image: Image.Image, reference: VisionReference) -> ImageTokens:
        """Return the patches of the crop."""
        described = self.processor.image_processor
        mean, std = (torch.tensor(values)[:, None, None] for values in (described.image_mean, described.image_std))
        pixels = ((reference.feeds["pixel_values"][0] * std + mean) * 255).round().clamp(0, 255).byte()
        view = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
        return single_grid(self.patches, self.patches, view)

    @property
    def side(self) -> int:
        """Side of the images that the vision tower takes, in pixels."""
        return int(self.config.vision_config.image_size)

    @property
    def patches(self) -> int:
        """Patches per row and per column of the images that the vision tower takes."""
        return self.side // int(self.config.vision_config.patch_size)

    def encode_with_saliency(self, encode: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Run the vision tower, and score its tokens by transformers' own attention weights.

        Args:
            encode: runs the tower once, on B images.

        Returns:
            What ``encode`` returned, and the saliency ``[B, N]``, fp32: the attention from the CLS token to each
            patch in the last layer that the features are taken from, mean over heads; without a CLS token, the mean
            attention that each patch receives from all patches.
        """
        layer = max(feature_layers(self.config))  # counted from 1
        attention = self.model.model.vision_tower.encoder.layers[layer - 1].self_attn
        seen: list[Tensor] = []
        hook = attention.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
        try:
            features = encode()
        finally:
            hook.remove()
        has_cls = (
            self.config.vision_feature_select_strategy == "default"
        )  # true of every exported tower with this strategy
        weights = torch.cat(list(_attention_weights(attention, seen[0])))  # [B, L, L]
        return features, weights[:, 0, 1:] if has_cls else weights.mean(dim=1)

    def refuse_other_size(self, made: str, fix: str) -> None:
        """Refuse an image processor whose crops have another size than the vision tower takes."""
        blank = Image.new("RGB", (64, 48))
        values = self.processor.image_processor(images=[blank], return_tensors="np")["pixel_values"]
        height, width = values[0].shape[-2:]
        if (height, width) != (self.side, self.side):
            raise UnsupportedModelError(
                f"the preprocessing of this model makes {made} of {height} x {width} pixels",
                expected=f"{self.side} x {self.side}, the size of its vision tower",
                fix=fix,
            )


def _attention_weights(attention: Any, hidden_states: Tensor) -> Iterator[Tensor]:
    """Yield the attention weights of a transformers layer for each image, mean over heads: fp32 ``[1, L, L]``."""
    eager = copy.copy(attention)
    eager.config = copy.copy(attention.config)
    eager.config._attn_implementation = "eager"  # the only implementation that returns its weights
    for states in hidden_states.split(1):
        yield eager(hidden_states=states, attention_mask=None)[1].float().mean(dim=1)
