"""What the families with a CLIP vision tower share: its graph, and what of it is not exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from promprune.errors import UnsupportedModelError

__all__ = ["ClipVisionEncoder", "cls_attention", "refuse_unsupported", "scored_layers"]


class ClipVisionEncoder(nn.Module):
    """CLIP up to the layer that the model reads its features from, then the projector.

    Only the layers that contribute are run. The saliency is the attention from CLS to the patches in the layer
    that produced the features (as in the authors' code), computed from that layer's own
    query and key projections, so that it is there whatever attention implementation the tower uses.
    """

    def __init__(self, vision_tower: Any, projector: nn.Module, num_layers: int) -> None:
        super().__init__()
        self.embeddings = vision_tower.embeddings
        self.pre_layernorm = vision_tower.pre_layrnorm  # spelled so in transformers
        self.layers = vision_tower.encoder.layers[:num_layers]
        self.projector = projector

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """``pixel_values [B, 3, H, W]`` -> ``image_features [B, N, D]``, ``saliency [B, N]`` (fp32)."""
        hidden_states: Tensor = self.pre_layernorm(self.embeddings(pixel_values))
        *layers, scored = self.layers
        for layer in layers:
            hidden_states = layer(hidden_states, attention_mask=None)
        saliency = cls_attention(scored.self_attn, scored.layer_norm1(hidden_states))
        hidden_states = scored(hidden_states, attention_mask=None)
        return self.projector(hidden_states[:, 1:]), saliency


def cls_attention(attention: Any, hidden_states: Tensor) -> Tensor:
    """Attention that every patch receives from CLS, mean over heads.

    Args:
        attention: a CLIP self-attention layer with H heads.
        hidden_states: its input, ``[B, 1 + N, width]``, CLS first.

    Returns:
        ``[B, N]``, fp32, at least 0; a row sums to 1 less what CLS pays to itself.
    """
    batch, length, _ = hidden_states.shape
    heads, head_dim = attention.num_heads, attention.head_dim
    query = attention.q_proj(hidden_states[:, :1]).view(batch, 1, heads, head_dim).transpose(1, 2)
    key = attention.k_proj(hidden_states).view(batch, length, heads, head_dim).transpose(1, 2)
    scores = (query @ key.transpose(2, 3)).float() * attention.scale  # [B, H, 1, 1 + N]
    return torch.softmax(scores, dim=-1).mean(dim=1)[:, 0, 1:]


def refuse_unsupported(config: Any) -> None:
    """Refuse a LLaVA whose visual tokens are made in a way that is not exported.

    Raises:
        UnsupportedModelError: the vision tower is not CLIP, or its features are read from elsewhere than the patches
            of one layer.
    """
    if config.vision_config.model_type != "clip_vision_model":
        raise UnsupportedModelError(
            f"this LLaVA has a {config.vision_config.model_type!r} vision tower",
            expected="'clip_vision_model': the selection reads the attention of its CLS token",
        )
    if config.vision_feature_select_strategy != "default":
        raise UnsupportedModelError(
            f"this LLaVA has vision_feature_select_strategy = {config.vision_feature_select_strategy!r}",
            expected="'default', which leaves the CLS token out of the visual tokens",
        )
    if not isinstance(config.vision_feature_layer, int):
        raise UnsupportedModelError(
            f"this LLaVA has vision_feature_layer = {config.vision_feature_layer}",
            expected="one layer: with several, which layer's attention to score is not defined",
        )
    layers = config.vision_config.num_hidden_layers
    if not 1 <= scored_layers(config) <= layers:
        raise UnsupportedModelError(
            f"this LLaVA has vision_feature_layer = {config.vision_feature_layer} in a tower of {layers} layers",
            expected="the output of one of its layers",
        )


def scored_layers(config: Any) -> int:
    """Layers that have run when the features are read: ``hidden_states[k]`` is the output of layer k."""
    layer: int = config.vision_feature_layer
    return layer if layer >= 0 else int(config.vision_config.num_hidden_layers) + 1 + layer
