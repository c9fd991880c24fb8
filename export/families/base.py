"""What a model family provides to the export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["AdaptedModel", "Family", "ImageGeometry"]


@dataclass(frozen=True, kw_only=True)
class ImageGeometry:
    """Shape of one image on its way into the language model.

    Attributes:
        height, width: of ``pixel_values``, in pixels.
        patch_rows, patch_columns: of the grid of visual tokens, in raster order.
    """

    height: int
    width: int
    patch_rows: int
    patch_columns: int

    @property
    def num_tokens(self) -> int:
        """N, the visual tokens of one image before selection."""
        return self.patch_rows * self.patch_columns


@dataclass(frozen=True, kw_only=True)
class AdaptedModel:
    """A loaded model, taken apart at the places where the exported graphs begin and end.

    Attributes:
        vision: ``pixel_values [B, 3, H, W]`` (fp32) -> ``image_features [B, N, D]`` in the model's dtype, and
            ``saliency [B, N]`` (fp32), the attention each patch receives from CLS, mean over the heads.
        embed_tokens: ``input_ids [B, S]`` (int64) -> ``inputs_embeds [B, S, D]``.
        language_model: a Hugging Face decoder stack that takes ``inputs_embeds`` and ``past_key_values``.
        lm_head: hidden states ``[B, S, D]`` -> logits ``[B, S, vocabulary]``.
        text_config: configuration of the language model.
        geometry: of one image.
        image_token_id: the placeholder in ``input_ids`` that a visual token replaces.
        position_axes: what the language model's ``position_ids`` have in front of ``[B, S]``: nothing, or ``(3,)``
            where a token has one rotary position each for time, height and width.
    """

    vision: nn.Module
    embed_tokens: nn.Module
    language_model: nn.Module
    lm_head: nn.Module
    text_config: Any
    geometry: ImageGeometry
    image_token_id: int
    position_axes: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: as in ``config.json``.
        model_class: name of the class in ``transformers`` that loads it.
        adapt: takes a loaded model apart; raises ``UnsupportedModelError`` on a feature that is not exported.
        reference_features: the model's own path from ``pixel_values`` to all ``image_features [B, N, D]``, which the
            exported graph is verified against.
    """

    model_type: str
    model_class: str
    adapt: Callable[[Any], AdaptedModel]
    reference_features: Callable[[Any, Tensor], Tensor]
