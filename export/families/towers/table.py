"""The vision towers of the LLaVA families, from ``pixel_values`` to projected features and their saliency."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from promprune.errors import UnsupportedModelError
from promprune.export.families.towers.clip import ClipVisionEncoder
from promprune.export.families.towers.siglip import SiglipVisionEncoder

__all__ = ["TOWERS", "Tower", "vision_encoder"]


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A kind of vision tower.

    Attributes:
        encoder: class of its graph; called with the tower, the projector and the number of layers that run.
        strategy: the only supported ``vision_feature_select_strategy``: the one whose visual tokens are the patches.
        reason: why only this one is supported; ends the error message.
    """

    encoder: type[nn.Module]
    strategy: str
    reason: str


# By the model_type of the tower.
TOWERS: Final[dict[str, Tower]] = {
    "clip_vision_model": Tower(
        encoder=ClipVisionEncoder, strategy="default", reason="which leaves the CLS token out of the visual tokens"
    ),
    "siglip_vision_model": Tower(
        encoder=SiglipVisionEncoder, strategy="full", reason="because SigLIP has no CLS token to leave out"
    ),
}


def vision_encoder(model: Any, towers: Collection[str]) -> nn.Module:
    """Return the vision tower and projector of a LLaVA model as the module of its vision graph.

    Args:
        model: ``LlavaForConditionalGeneration`` or ``LlavaNextForConditionalGeneration``.
        towers: ``model_type`` of the towers that this family is exported with.

    Raises:
        UnsupportedModelError: the model has another tower, or its features are not the patches of one layer.
    """
    config = model.config
    kind, layer = config.vision_config.model_type, config.vision_feature_layer
    if kind not in towers:
        raise UnsupportedModelError(f"this model has a {kind!r} vision tower", expected=" or ".join(map(repr, towers)))
    tower = TOWERS[kind]
    if config.vision_feature_select_strategy != tower.strategy:
        raise UnsupportedModelError(
            f"this model has vision_feature_select_strategy = {config.vision_feature_select_strategy!r}",
            expected=f"{tower.strategy!r}, {tower.reason}",
        )
    if not isinstance(layer, int):
        raise UnsupportedModelError(
            f"this model has vision_feature_layer = {layer}",
            expected="one layer: with several, it is not defined which layer's attention is the saliency",
        )
    layers = int(config.vision_config.num_hidden_layers)
    run = layer if layer >= 0 else layers + 1 + layer  # hidden_states[k] is the output of layer k
    if not 1 <= run <= layers:
        raise UnsupportedModelError(
            f"this model has vision_feature_layer = {layer} in a tower of {layers} layers",
            expected="the output of one of its layers",
        )
    return tower.encoder(model.model.vision_tower, model.model.multi_modal_projector, run)
