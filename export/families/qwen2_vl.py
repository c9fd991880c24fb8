"""Qwen2-VL: like Qwen2.5-VL, but all blocks of the vision tower have full attention."""

from __future__ import annotations

from promprune.export.families.qwen2_5_vl import Qwen25VL

__all__ = ["Qwen2VL"]


class Qwen2VL(Qwen25VL):
    """Qwen2-VL: a tower without windows."""

    model_type = "qwen2_vl"
    model_class = "Qwen2VLForConditionalGeneration"

    @property
    def window(self) -> None:
        """There are no windows."""
        return

    @property
    def full_blocks(self) -> range:
        """All blocks."""
        return range(self.config.vision_config.depth)
