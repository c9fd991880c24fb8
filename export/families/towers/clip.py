"""CLIP, the vision tower of the paper: a patch is as salient as the attention it receives from the CLS token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ClipVisionEncoder", "cls_attention"]


class ClipVisionEncoder(nn.Module):
    """CLIP up to the layer that produces the features, then the projector.

    Only the layers that contribute are run. The saliency is the attention from CLS to the patches in the layer that
    produces the features (as in the authors' code), computed from that layer's query and key projections, so that it
    is available with every attention implementation of the tower.
    """

    def __init__(self, vision_tower: Any, projector: nn.Module, num_layers: int) -> None:
        super().__init__()
        self.embeddings = vision_tower.embeddings
        self.pre_layernorm = vision_tower.pre_layrnorm  # the misspelling is transformers' own
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
    """Return the attention that every patch receives from CLS, mean over heads.

    Args:
        attention: a CLIP self-attention layer with H heads.
        hidden_states: its input, ``[B, 1 + N, width]``, CLS first.

    Returns:
        ``[B, N]``, fp32, at least 0; a row sums to 1 minus the attention of CLS to itself.
    """
    batch, length, _ = hidden_states.shape
    heads, head_dim = attention.num_heads, attention.head_dim
    query = attention.q_proj(hidden_states[:, :1]).view(batch, 1, heads, head_dim).transpose(1, 2)
    key = attention.k_proj(hidden_states).view(batch, length, heads, head_dim).transpose(1, 2)
    scores = (query @ key.transpose(2, 3)).float() * attention.scale  # [B, H, 1, 1 + N]
    return torch.softmax(scores, dim=-1).mean(dim=1)[:, 0, 1:]
