"""LLaVA-NeXT: LLaVA's vision tower on several crops of an image, which show it whole and enlarged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from promprune.errors import UnsupportedModelError
from promprune.export.families.base import AdaptedModel, Grids, SampleInput, VisionGraph, VisionReference
from promprune.export.families.llava import with_saliency
from promprune.export.families.towers.table import vision_encoder
from promprune.package.image import IMAGE_NEWLINE_FILE, AnyresLayout

__all__ = ["adapt", "kept_features", "reference"]


def adapt(model: Any, processor: Any, grids: Grids = ()) -> AdaptedModel:
    """Take a ``LlavaNextForConditionalGeneration`` apart; there are no grids to choose from.

    Raises:
        UnsupportedModelError: the vision tower is not CLIP, its features are read in a way not exported yet, or the
            preprocessing and the model disagree about the crops.
    """
    config = model.config
    vision = config.vision_config
    encoder = vision_encoder(model, ["clip_vision_model"])
    side, patches = vision.image_size, vision.image_size // vision.patch_size
    canvases = _canvases(config, processor, side)
    graph = VisionGraph(
        module=encoder,
        inputs={"pixel_values": SampleInput(sample=torch.zeros(2, 3, side, side), dims={0: "batch_size"})},
        num_tokens=patches * patches,
        token_mask=True,
    )
    return AdaptedModel(
        vision_graphs=(graph,),
        embed_tokens=model.model.language_model.embed_tokens,
        language_model=model.model.language_model,
        lm_head=model.lm_head,
        text_config=config.text_config,
        layout=AnyresLayout(side=side, patches=patches, canvases=canvases),
        sample_sizes=_sample_sizes(canvases),
        image_token_id=config.image_token_id,
        arrays={IMAGE_NEWLINE_FILE: model.model.image_newline.float()},
    )


@dataclass(frozen=True, kw_only=True)
class AnyresReference(VisionReference):
    """A reference whose features are those of crops.

    Attributes:
        all_features: of every crop, those that show nothing but padding included: ``[crops, N, D]``.
        image_size: height and width of the image, in pixels.
    """

    all_features: Tensor
    image_size: tuple[int, int]


def reference(model: Any, processor: Any, image: Image.Image, adapted: AdaptedModel) -> AnyresReference:
    """Preprocess and encode one image with transformers; crops that are padding throughout are left out."""
    config = model.config
    inputs = processor.image_processor(images=[image], return_tensors="pt")
    image_size = (image.height, image.width)
    pixel_values = inputs["pixel_values"][0].float()
    hidden, saliency = with_saliency(
        model,
        lambda: model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[
            config.vision_feature_layer
        ],
    )
    features = model.model.multi_modal_projector(hidden[:, 1:])
    places = torch.arange(features[1:].shape[:2].numel(), dtype=torch.float64).view(-1, features.shape[1], 1)
    mask = torch.zeros(places.numel(), dtype=torch.bool)
    mask[_unpadded(config, places, image_size).flatten().long()] = True
    mask = torch.cat([torch.ones_like(mask[: features.shape[1]]), mask]).view(features.shape[:2])
    used = mask.any(dim=1)
    return AnyresReference(
        feeds={"pixel_values": pixel_values[used], "token_mask": mask[used]},
        features=features[used],
        saliency=saliency[used],
        all_features=features,
        image_size=image_size,
    )


def kept_features(model: Any, reference: VisionReference, token_indices: Tensor) -> Tensor:
    """Return the features of the kept tokens, ``[T, D]``; if all are kept, with ``image_newline`` behind the rows."""
    assert isinstance(reference, AnyresReference)  # as the function above returned it
    whole, crops = reference.all_features[0], reference.all_features[1:]
    tokens = torch.cat([whole, _unpadded(model.config, crops, reference.image_size).flatten(1).T])
    if len(token_indices) < len(tokens):
        return tokens[token_indices]
    packed: list[Tensor]
    packed, _ = model.model.pack_image_features(
        [reference.all_features],
        [reference.image_size],
        vision_feature_select_strategy="default",
        image_newline=model.model.image_newline,
    )
    return packed[0]


def _unpadded(config: Any, crops: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Put the tokens of crops ``[crops, N, D]`` together, and take the padding off: ``[D, rows, columns]``."""
    side = config.vision_config.image_size
    patches = side // config.vision_config.patch_size
    rows, columns = get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, side)
    canvas = crops.view(rows, columns, patches, patches, -1).permute(4, 0, 2, 1, 3)
    unpadded: Tensor = unpad_image(canvas.flatten(1, 2).flatten(2, 3), image_size)
    return unpadded


def _canvases(config: Any, processor: Any, side: int) -> tuple[tuple[int, int], ...]:
    """Return height and width of what an image can be enlarged to; refuse what is not made of whole crops."""
    canvases = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
    for height, width in canvases:
        if height < side or width < side or height % side or width % side:
            raise UnsupportedModelError(
                f"this LLaVA-NeXT has {[height, width]} among its image_grid_pinpoints",
                expected=f"multiples of {side}, the size of its vision tower: a partial crop has no place in the grid",
            )
    theirs = tuple(tuple(size) for size in processor.image_processor.image_grid_pinpoints)
    if not canvases or theirs != canvases:
        raise UnsupportedModelError(
            f"the preprocessing of this LLaVA-NeXT has image_grid_pinpoints = {theirs}",
            expected=f"{canvases}, as in its config.json, and at least one",
            fix="set the same in preprocessor_config.json and config.json",
        )
    values = processor.image_processor(images=[Image.new("RGB", (64, 48))], return_tensors="np")["pixel_values"]
    made = tuple(values[0].shape[-2:])
    if made != (side, side):
        raise UnsupportedModelError(
            f"the preprocessing of this LLaVA-NeXT makes crops of {made[0]} x {made[1]} pixels",
            expected=f"{side} x {side}, the size of its vision tower",
            fix="set size and crop_size in its preprocessor_config.json",
        )
    return canvases


def _sample_sizes(canvases: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Sizes that fill a canvas, and sizes that leave padding above and below, or at the sides."""
    sizes = []
    for index, (height, width) in enumerate(canvases):
        sizes.append([(height, width), (height * 3 // 4, width), (height, width * 2 // 3)][index % 3])
    return tuple(sizes)
