"""The model families that can be exported: one literal table, one file per Hugging Face ``model_type``.

To add a family: write ``<model_type>.py`` beside this file with the functions of a
:class:`~promprune.export.families.base.Family`, and add its row below.
"""

from __future__ import annotations

from typing import Final

from promprune.export.families import llava, llava_next, qwen2_5_vl, qwen2_vl
from promprune.export.families.base import AdaptedModel, Family, Grids, VisionGraph, VisionReference, grids_of

__all__ = ["FAMILIES", "AdaptedModel", "Family", "Grids", "VisionGraph", "VisionReference", "grids_of"]

_ROWS: Final = (
    Family(
        model_type="llava",
        model_class="LlavaForConditionalGeneration",
        adapt=llava.adapt,
        reference=llava.reference,
        kept_features=llava.kept_features,
    ),
    Family(
        model_type="llava_next",
        model_class="LlavaNextForConditionalGeneration",
        adapt=llava_next.adapt,
        reference=llava_next.reference,
        kept_features=llava_next.kept_features,
    ),
    Family(
        model_type="qwen2_5_vl",
        model_class="Qwen2_5_VLForConditionalGeneration",
        adapt=qwen2_5_vl.adapt,
        default_grids=qwen2_5_vl.default_grids,
        reference=qwen2_5_vl.reference,
        kept_features=qwen2_5_vl.kept_features,
        position_ids=qwen2_5_vl.position_ids,
    ),
    Family(
        model_type="qwen2_vl",
        model_class="Qwen2VLForConditionalGeneration",
        adapt=qwen2_vl.adapt,
        default_grids=qwen2_vl.default_grids,
        reference=qwen2_vl.reference,
        kept_features=qwen2_vl.kept_features,
        position_ids=qwen2_vl.position_ids,
    ),
)

FAMILIES: Final[dict[str, Family]] = {row.model_type: row for row in _ROWS}
