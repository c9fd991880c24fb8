"""LLaVA-OneVision: LLaVA-NeXT's crops with a SigLIP tower, and large images shrunk to the tokens of nine crops."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from promprune.errors import UnsupportedModelError
from promprune.export.families.llava_next import AnyresReference, LlavaNext
from promprune.package.image import SHRINK_ABOVE, AnyresLayout

__all__ = ["LlavaOnevision"]


class LlavaOnevision(LlavaNext):
    """LLaVA-OneVision: a single image is divided into crops; each of several images is one crop.

    A package with a selection keeps tokens of the crops as they are: the shrinking of large images (``anyres_max_9``)
    is transformers' own way to have fewer tokens, and applies only if all tokens are kept.
    """

    model_type = "llava_onevision"
    model_class = "LlavaOnevisionForConditionalGeneration"
    towers = ("siglip_vision_model",)

    @property
    def crops(self) -> AnyresLayout:
        """How an image is divided into crops, and when its tokens are shrunk."""
        return AnyresLayout(
            side=self.side,
            patches=self.patches,
            canvases=self.canvases,
            shrink_to_crops=self.shrink_to_crops,
            one_crop_each=True,
        )

    @property
    def shrink_to_crops(self) -> int:
        """The number in ``vision_aspect_ratio``, such as 9 in "anyres_max_9"."""
        stated = str(self.config.vision_aspect_ratio)
        match = re.fullmatch(r"anyres_max_([1-9]\d*)", stated)
        if match is None:
            raise UnsupportedModelError(
                f"this model has vision_aspect_ratio = {stated!r}", expected="'anyres_max_' and a number of crops"
            )
        return int(match[1])

    @property
    def sample_canvases(self) -> tuple[tuple[int, int], ...]:
        """The smallest canvases, and the smallest one whose tokens are shrunk."""
        least = SHRINK_ABOVE**2 * self.shrink_to_crops * self.side**2
        shrunk = sorted((canvas for canvas in self.canvases if canvas[0] * canvas[1] > least), key=_area)
        return tuple(dict.fromkeys((*super().sample_canvases, *shrunk[:1])))

    def pack(self, reference: AnyresReference) -> Tensor:
        """Return all features of an image as transformers gives them to the language model: shrunk, with newlines."""
        model: Any = self.model.model
        packed, _ = model.pack_image_features(
            [reference.all_features],
            [reference.image_size],
            image_newline=model.image_newline,
            vision_aspect_ratio=self.config.vision_aspect_ratio,
        )
        features: Tensor = packed[0]
        return features


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]
