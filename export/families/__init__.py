"""The model families that can be exported: one literal table, one file per Hugging Face ``model_type``.

To add a family: write ``<model_type>.py`` beside this file with a function that adapts a loaded model to
:class:`~promprune.export.families.base.AdaptedModel`, and add its row below.
"""

from __future__ import annotations

from typing import Final

from promprune.export.families import llava
from promprune.export.families.base import AdaptedModel, Family, ImageGeometry

__all__ = ["FAMILIES", "AdaptedModel", "Family", "ImageGeometry"]

FAMILIES: Final[dict[str, Family]] = {
    "llava": Family(
        model_type="llava",
        model_class="LlavaForConditionalGeneration",
        adapt=llava.adapt,
        reference_features=llava.reference_features,
    ),
}
