"""SigLIP, a vision tower without a CLS token: a patch is as salient as the attention it receives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from promprune.export.families.towers.clip import concatenate_layers

__all__ = ["SiglipVisionEncoder", "received_attention"]


class SiglipVisionEncoder(nn.Module):
    """SigLIP up to the last layer that produces features, then the projector.

    Only the layers that contribute are run. The saliency is the attention that each patch receives from all patches in
    the layer that produces the features, computed from that layer's query and key projections, so that it is
    available with every attention implementation of the tower. It replaces the CLS attention of the paper. If several
    layers produce features, it is that of the last one.

    Args:
        vision_tower: transformers' tower.
        projector: from the features to the width of the language model.
        feature_layers: the layers whose outputs are concatenated to the features, counted from 1.
    """

    def __init__(self, vision_tower: Any, projector: nn.Module, feature_layers: Sequence[int]) -> None:
        super().__init__()
        self.feature_layers = tuple(feature_layers)
        self.embeddings = vision_tower.embeddings
        self.layers = vision_tower.encoder.layers[: max(feature_layers)]
        self.projector = projector

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """``pixel_values [B, 3, H, W]`` -> ``image_features [B, N, D]``, ``saliency [B, N]`` (fp32)."""
        hidden_states: Tensor = self.embeddings(pixel_values)
        *layers, scored = self.layers
        states = [hidden_states]  # the output of layer k at k, counted from 1, as in transformers
        for layer in layers:
            states.append(layer(states[-1], attention_mask=None))
        saliency = received_attention(scored.self_attn, scored.layer_norm1(states[-1]))
        states.append(scored(states[-1], attention_mask=None))
        return self.projector(concatenate_layers(states, self.feature_layers)), saliency


def received_attention(attention: Any, hidden_states: Tensor) -> Tensor:
    """Return the attention that every patch receives, mean over heads and over all querying patches.

    Args:
        attention: a SigLIP self-attention layer with H heads.
        hidden_states: its input, ``[B, N, width]``.

    Returns:
        ``[B, N]``, fp32, at least 0; a row sums to 1.
    """
    batch, length, _ = hidden_states.shape
    shape = (batch, length, attention.num_heads, attention.head_dim)
    query = attention.q_proj(hidden_states).view(shape).transpose(1, 2)
    key = attention.k_proj(hidden_states).view(shape).transpose(1, 2)
    scores = (query @ key.transpose(2, 3)).float() * attention.scale  # [B, H, N, N]
    return torch.softmax(scores, dim=-1).mean(dim=(1, 2))
