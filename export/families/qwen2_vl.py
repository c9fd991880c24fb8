"""Qwen2-VL: as Qwen2.5-VL, with a vision tower whose blocks all attend to the whole image."""

from __future__ import annotations

from typing import Any

from promprune.export.families.base import AdaptedModel, Grids
from promprune.export.families.qwen2_5_vl import (
    adapted_with_grids,
    default_grids,
    kept_features,
    position_ids,
    reference,
)

__all__ = ["adapt", "default_grids", "kept_features", "position_ids", "reference"]


def adapt(model: Any, processor: Any, grids: Grids) -> AdaptedModel:
    """Take a ``Qwen2VLForConditionalGeneration`` apart, for images of some sizes.

    Raises:
        UnsupportedModelError: its language model attends within a sliding window, or its image processor never makes
            images of such a size.
    """
    every_block = range(model.config.vision_config.depth)
    return adapted_with_grids(model, processor, grids, window=None, full_blocks=every_block)
