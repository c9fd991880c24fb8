"""The vision towers of the LLaVA families, from ``pixel_values`` to projected features and their saliency."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from promprune.errors import UnsupportedModelError
from promprune.export.families.towers.clip import ClipVisionEncoder
from promprune.export.families.towers.siglip import SiglipVisionEncoder

__all__ = ["TOWERS", "Tower", "feature_layers", "vision_encoder"]


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A kind of vision tower.

    Attributes:
        encoder: class of its graph; called with the tower, the projector and the layers of the features.
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


def vision_encoder(model: Any) -> nn.Module:
    """Return the vision tower and projector of a LLaVA model as the module of its vision graph.

    Args:
        model: one of transformers' LLaVA models, with a tower of this table.

    Raises:
        UnsupportedModelError: its visual tokens are not the patches.
    """
    config = model.config
    tower = TOWERS[config.vision_config.model_type]
    if config.vision_feature_select_strategy != tower.strategy:
        raise UnsupportedModelError(
            f"this model has vision_feature_select_strategy = {config.vision_feature_select_strategy!r}",
            expected=f"{tower.strategy!r}, {tower.reason}",
        )
    return tower.encoder(model.model.vision_tower, model.model.multi_modal_projector, feature_layers(config))


def feature_layers(config: Any) -> tuple[int, ...]:
    """Return the layers whose outputs are concatenated to the features, counted from 1; 0 is the input of the first.

    Raises:
        UnsupportedModelError: the tower has no such layers.
    """
    stated, layers = config.vision_feature_layer, int(config.vision_config.num_hidden_layers)
    found = [stated] if isinstance(stated, int) else list(stated)
    counted = tuple(layer if layer >= 0 else layers + 1 + layer for layer in found)
    if not counted or min(counted) < 0 or not 1 <= max(counted) <= layers:
        raise UnsupportedModelError(
            f"this model has vision_feature_layer = {stated} in a tower of {layers} layers",
            expected="the outputs of its layers",
        )
    return counted
