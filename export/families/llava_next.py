"""LLaVA-NeXT: LLaVA's vision tower on several crops of an image: one of the entire image, the others enlarged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from promprune.errors import UnsupportedModelError
from promprune.export.families.base import ImageTokens, VisionModule, VisionReference
from promprune.export.families.llava import Llava
from promprune.package.image import IMAGE_NEWLINE_FILE, AnyresLayout
from promprune.runtime.images.anyres import fit_to_canvas, image_token_indices, token_grids, view_of

__all__ = ["AnyresReference", "LlavaNext"]

MAX_SAMPLE_CANVASES: Final = 6


@dataclass(frozen=True, kw_only=True)
class AnyresReference(VisionReference):
    """A reference with the features of several crops.

    Attributes:
        all_features: features of every crop, including crops that are entirely padding: ``[crops, N, D]``.
        image_size: height and width of the image, in pixels.
    """

    all_features: Tensor
    image_size: tuple[int, int]


class LlavaNext(Llava):
    """LLaVA-NeXT: the selection runs once per crop, and skips the padding of crops at the edge."""

    model_type = "llava_next"
    model_class = "LlavaNextForConditionalGeneration"

    def build_vision_modules(self) -> tuple[VisionModule, ...]:
        """Return the tower and the projector, with a mask of the tokens that are not padding."""
        (module,) = super().build_vision_modules()
        return (replace(module, token_mask=True),)

    def build_layout(self) -> AnyresLayout:
        """Return the layout of crops; refuse a model that disagrees with its preprocessing about it."""
        self._refuse_other_canvases()
        self.refuse_other_size("crops", "set size and crop_size in its preprocessor_config.json")
        return self.crops

    @property
    def crops(self) -> AnyresLayout:
        """How an image is divided into crops."""
        return AnyresLayout(side=self.side, patches=self.patches, canvases=self.canvases)

    @property
    def canvases(self) -> tuple[tuple[int, int], ...]:
        """(height, width), in pixels, of the canvases on which an image can be placed."""
        return tuple((int(height), int(width)) for height, width in self.config.image_grid_pinpoints)

    @property
    def sample_sizes(self) -> tuple[tuple[int, int], ...]:
        """Sizes that fill a canvas, and sizes that leave padding above and below, or at the sides."""
        sizes = []
        for index, (height, width) in enumerate(self.sample_canvases):
            sizes.append([(height, width), (height * 3 // 4, width), (height, width * 2 // 3)][index % 3])
        return tuple(sizes)

    @property
    def sample_canvases(self) -> tuple[tuple[int, int], ...]:
        """The canvases that a package is verified on: all, or the smallest ones if there are many."""
        if len(self.canvases) <= MAX_SAMPLE_CANVASES:
            return self.canvases
        return tuple(sorted(self.canvases, key=math.prod)[:MAX_SAMPLE_CANVASES])

    @property
    def arrays(self) -> Mapping[str, Tensor]:
        """The embedding that is inserted after every row of an image if all its tokens are kept."""
        return {IMAGE_NEWLINE_FILE: self.model.model.image_newline}

    def reference(self, image: Image.Image) -> AnyresReference:
        """Preprocess and encode one image with transformers; skip crops that are entirely padding."""
        inputs = self.processor.image_processor(images=[image], return_tensors="pt")
        image_size = (image.height, image.width)
        pixel_values = inputs["pixel_values"][0].float()
        features, saliency = self.encode_with_saliency(lambda: self._project(pixel_values, image_size))
        mask = self._token_mask(features, image_size)
        used = mask.any(dim=1)
        return AnyresReference(
            feeds={"pixel_values": pixel_values[used], "token_mask": mask[used]},
            features=features[used],
            saliency=saliency[used],
            all_features=features,
            image_size=image_size,
        )

    def image_tokens(self, image: Image.Image, reference: VisionReference) -> ImageTokens:
        """Return the tokens of the crop of the entire image, and of its canvas."""
        layout = self.crops
        fit = fit_to_canvas(image.height, image.width, layout)
        resample = self.processor.image_processor.resample
        canvas = Image.new("RGB", fit.canvas[::-1])
        canvas.paste(image.resize(fit.resized[::-1], resample), (fit.left, fit.top))
        whole = image.resize((self.side, self.side), resample)
        indices = torch.from_numpy(image_token_indices(fit, layout))
        return ImageTokens(
            indices=indices[(indices >= 0).any(dim=1)],
            grids=token_grids(fit, layout),
            view=view_of(whole, canvas, fit, layout),
        )

    def kept_features(self, reference: VisionReference, token_indices: Tensor) -> Tensor:
        """Return the kept features, ``[T, D]``; if all are kept, with ``image_newline`` after each row."""
        assert isinstance(reference, AnyresReference)  # returned by the method above
        whole, crops = reference.all_features[0], reference.all_features[1:]
        tokens = torch.cat([whole, self._unpadded(crops, reference.image_size).flatten(1).T])
        if len(token_indices) < len(tokens):
            return tokens[token_indices]
        return self.pack(reference)

    def pack(self, reference: AnyresReference) -> Tensor:
        """Return all features of an image as transformers gives them to the language model, with newlines."""
        packed: list[Tensor]
        packed, _ = self.model.model.pack_image_features(
            [reference.all_features],
            [reference.image_size],
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            image_newline=self.model.model.image_newline,
        )
        return packed[0]

    def _project(self, pixel_values: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Return transformers' features of every crop of one image, before they are arranged: ``[crops, N, D]``."""
        seen: list[Tensor] = []
        hook = self.model.model.multi_modal_projector.register_forward_hook(lambda *call: seen.append(call[2]))
        try:
            self.model.get_image_features(pixel_values[None], image_sizes=torch.tensor([image_size]))
        finally:
            hook.remove()
        return seen[0]

    def _token_mask(self, features: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Return which tokens of crops ``[crops, N, D]`` are not padding: bool ``[crops, N]``."""
        shape = features.shape[:2]
        places = torch.arange(features[1:].shape[:2].numel(), dtype=torch.float64).view(-1, shape[1], 1)
        mask = torch.zeros(places.numel(), dtype=torch.bool)
        mask[self._unpadded(places, image_size).flatten().long()] = True
        return torch.cat([torch.ones_like(mask[: shape[1]]), mask]).view(shape)

    def _unpadded(self, crops: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Arrange the tokens of crops ``[crops, N, D]`` as one image without padding: ``[D, rows, columns]``."""
        rows, columns = get_anyres_image_grid_shape(image_size, self.config.image_grid_pinpoints, self.side)
        canvas = crops.view(rows, columns, self.patches, self.patches, -1).permute(4, 0, 2, 1, 3)
        unpadded: Tensor = unpad_image(canvas.flatten(1, 2).flatten(2, 3), image_size)
        return unpadded

    def _refuse_other_canvases(self) -> None:
        """Refuse canvases that are not multiples of the crop size, or that differ from the image processor's."""
        side = self.side
        for height, width in self.canvases:
            if height < side or width < side or height % side or width % side:
                raise UnsupportedModelError(
                    f"this LLaVA-NeXT has {[height, width]} among its image_grid_pinpoints",
                    expected=f"multiples of {side}, the size of its vision tower: partial crops are not supported",
                )
        theirs = tuple(tuple(size) for size in self.processor.image_processor.image_grid_pinpoints)
        if not self.canvases or theirs != self.canvases:
            raise UnsupportedModelError(
                f"the preprocessing of this LLaVA-NeXT has image_grid_pinpoints = {theirs}",
                expected=f"{self.canvases}, as in its config.json, and at least one",
                fix="set the same in preprocessor_config.json and config.json",
            )
