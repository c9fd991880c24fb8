"""The model families that can be exported: one table, one file per Hugging Face ``model_type``.

To add a family: write a subclass of :class:`~promprune.export.families.base.Family` in ``<model_type>.py`` beside this
file, and add it to the table below.
"""

from __future__ import annotations

from typing import Final

from promprune.export.families.base import Family, Grids, VisionModule, VisionReference
from promprune.export.families.llava import Llava
from promprune.export.families.llava_next import LlavaNext
from promprune.export.families.llava_onevision import LlavaOnevision
from promprune.export.families.qwen2_5_vl import Qwen25VL
from promprune.export.families.qwen2_vl import Qwen2VL

__all__ = ["FAMILIES", "Family", "Grids", "VisionModule", "VisionReference"]

FAMILIES: Final[dict[str, type[Family]]] = {
    family.model_type: family for family in (Llava, LlavaNext, LlavaOnevision, Qwen25VL, Qwen2VL)
}
