"""CLIP, the vision tower of the paper: a patch is as salient as the attention it receives from the CLS token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ClipVisionEncoder", "cls_attention", "concatenate_layers"]


class ClipVisionEncoder(nn.Module):
    """CLIP up to the last layer that produces features, then the projector.

    Only the layers that contribute are run. The saliency is the attention from CLS to the patches in the layer that
    produces the features (as in the authors' code), computed from that layer's query and key projections, so that it
    is available with every attention implementation of the tower. Of several layers it is the last one.

    Args:
        vision_tower: transformers' tower.
        projector: from the features to the width of the language model.
        feature_layers: the layers whose outputs are concatenated to the features, counted from 1.
    """

    def __init__(self, vision_tower: Any, projector: nn.Module, feature_layers: Sequence[int]) -> None:
        super().__init__()
        self.feature_layers = tuple(feature_layers)
        self.embeddings = vision_tower.embeddings
        self.pre_layernorm = vision_tower.pre_layrnorm  # the misspelling is transformers' own
        self.layers = vision_tower.encoder.layers[: max(feature_layers)]
        self.projector = projector

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """``pixel_values [B, 3, H, W]`` -> ``image_features [B, N, D]``, ``saliency [B, N]`` (fp32)."""
        hidden_states: Tensor = self.pre_layernorm(self.embeddings(pixel_values))
        *layers, scored = self.layers
        states = [hidden_states]  # the output of layer k at k, counted from 1, as in transformers
        for layer in layers:
            states.append(layer(states[-1], attention_mask=None))
        saliency = cls_attention(scored.self_attn, scored.layer_norm1(states[-1]))
        states.append(scored(states[-1], attention_mask=None))
        return self.projector(concatenate_layers(states, self.feature_layers)[:, 1:]), saliency


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


def concatenate_layers(states: Sequence[Tensor], feature_layers: Sequence[int]) -> Tensor:
    """Return the outputs of some layers side by side: ``[B, L, layers x width]``.

    A single one is the last: its number may be another one in a graph that is traced with fewer layers.
    """
    if len(feature_layers) == 1:
        return states[-1]
    return torch.cat([states[layer] for layer in feature_layers], dim=-1)
