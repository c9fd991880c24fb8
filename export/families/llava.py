"""LLaVA-1.5 and its like: a vision tower (CLIP or SigLIP), an MLP projector, and a decoder-only language model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from promprune.errors import UnsupportedModelError
from promprune.export.families.base import AdaptedModel, Grids, SampleInput, VisionGraph, VisionReference
from promprune.export.families.towers.table import vision_encoder
from promprune.package.image import CropLayout

__all__ = ["adapt", "kept_features", "reference", "with_saliency"]


def adapt(model: Any, processor: Any, grids: Grids = ()) -> AdaptedModel:
    """Take a ``LlavaForConditionalGeneration`` apart; there are no grids to choose from.

    Raises:
        UnsupportedModelError: the vision tower is neither CLIP nor SigLIP, or its features are read in a way not
            exported yet.
    """
    config = model.config
    vision = config.vision_config
    encoder = vision_encoder(model)
    _refuse_other_size(vision.image_size, processor)
    side, grid = vision.image_size, vision.image_size // vision.patch_size
    pixel_values = SampleInput(sample=torch.zeros(2, 3, side, side), dims={0: "batch_size"})
    return AdaptedModel(
        vision_graphs=(VisionGraph(module=encoder, inputs={"pixel_values": pixel_values}, num_tokens=grid * grid),),
        embed_tokens=model.model.language_model.embed_tokens,
        language_model=model.model.language_model,
        lm_head=model.lm_head,
        text_config=config.text_config,
        layout=CropLayout(height=side, width=side, patch_rows=grid, patch_columns=grid),
        sample_sizes=((side, side),),
        image_token_id=config.image_token_id,
    )


def reference(model: Any, processor: Any, image: Image.Image, adapted: AdaptedModel) -> VisionReference:
    """Preprocess and encode one image with transformers."""
    pixel_values = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    features, saliency = with_saliency(
        model, lambda: torch.stack(list(model.get_image_features(pixel_values, return_dict=True).pooler_output))
    )
    return VisionReference(feeds={"pixel_values": pixel_values}, features=features, saliency=saliency)


def with_saliency(model: Any, encode: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Let the vision tower of a LLaVA run, and score what it saw by transformers' own attention weights.

    Args:
        model: ``LlavaForConditionalGeneration`` or ``LlavaNextForConditionalGeneration``.
        encode: runs the tower once, on B images.

    Returns:
        What ``encode`` returned, and the saliency ``[B, N]``, fp32: of the layer that the features are read from, what
        CLS pays to each patch; where there is no CLS token, what each patch receives from all. Mean over heads.
    """
    layer = model.config.vision_feature_layer  # hidden_states[k] is the output of layer k, counted from 1
    attention = model.model.vision_tower.encoder.layers[layer if layer < 0 else layer - 1].self_attn
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        features = encode()
    finally:
        hook.remove()
    has_cls = model.config.vision_feature_select_strategy == "default"  # as of every tower that is exported
    rows = [weights[:, 0, 1:] if has_cls else weights.mean(dim=1) for weights in _attention_weights(attention, seen[0])]
    return features, torch.cat(rows)


def _attention_weights(attention: Any, hidden_states: Tensor) -> Iterator[Tensor]:
    """Yield what a layer of transformers weighs one image with after the other, mean over heads: fp32 ``[1, L, L]``."""
    eager = copy.copy(attention)
    eager.config = copy.copy(attention.config)
    eager.config._attn_implementation = "eager"  # no other one returns its weights
    for states in hidden_states.split(1):
        yield eager(hidden_states=states, attention_mask=None)[1].float().mean(dim=1)


def kept_features(model: Any, reference: VisionReference, token_indices: Tensor) -> Tensor:
    """Return the features of the kept tokens, ``[T, D]``."""
    return reference.features[0, token_indices]


def _refuse_other_size(taken: int, processor: Any) -> None:
    blank = Image.new("RGB", (64, 48))
    values = processor.image_processor(images=[blank], return_tensors="np")["pixel_values"]
    height, width = values[0].shape[-2:]
    if (height, width) != (taken, taken):
        raise UnsupportedModelError(
            f"the preprocessing of this LLaVA makes images of {height} x {width} pixels",
            expected=f"{taken} x {taken}, the size of its vision tower",
            fix="set crop_size in its preprocessor_config.json",
        )
