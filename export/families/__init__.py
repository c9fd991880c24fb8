"""The model families that can be exported: one literal table, one file per Hugging Face ``model_type``.

To add a family: write ``<model_type>.py`` beside this file with the functions of a
:class:`~promprune.export.families.base.Family`, and add its row below.
"""

from __future__ import annotations

from typing import Final

from promprune.export.families import llava
from promprune.export.families.base import AdaptedModel, Family, VisionGraph, VisionReference

__all__ = ["FAMILIES", "AdaptedModel", "Family", "VisionGraph", "VisionReference"]

FAMILIES: Final[dict[str, Family]] = {
    "llava": Family(
        model_type="llava",
        model_class="LlavaForConditionalGeneration",
        adapt=llava.adapt,
        reference=llava.reference,
        kept_features=llava.kept_features,
    ),
}
