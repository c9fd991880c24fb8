"""Qwen2.5-VL: a vision tower of windows for images of any size, a decoder with three rotary positions per token.

The tower takes a fixed grid here: everything that depends on the size of the image (the windows, their masks, the
rotary tables, the way back to raster order) is computed once and becomes a constant of the graph.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids

__all__ = ["GridVisionEncoder", "window_order"]

_PADDING: Final = -1


class GridVisionEncoder(nn.Module):
    """A Qwen2-VL or Qwen2.5-VL vision tower for images of one size, with its projector (the merger).

    Inside the tower the groups of patches that become one token lie window by window. Windows that the edge of the
    grid cuts are filled up with padding, which nothing attends to, so that the attention of all windows is one
    batched product; there is no padding where the sides of the grid are multiples of the window's.

    The tower has no CLS token. The saliency of a token is the attention that its patches receive in the last block
    with full attention: the mean over heads, over all patches that look, and over the token's own patches. It is
    computed from the softmax that the block itself uses, in fp32.

    Args:
        visual: the tower, as transformers loads it.
        rows, columns: of the grid of tokens (groups of ``merge_size`` x ``merge_size`` patches).
        window: side of a window, in tokens; ``None``: the tower has none.
        full_blocks: indices of the blocks that attend to the whole image.
    """

    order: Tensor
    places: Tensor
    mask: Tensor
    looks: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(
        self, visual: Any, *, rows: int, columns: int, window: int | None, full_blocks: Collection[int]
    ) -> None:
        super().__init__()
        attention = visual.blocks[0].attn
        self.patch_embed = visual.patch_embed
        self.blocks = visual.blocks
        self.merger = visual.merger
        self.full_blocks = frozenset(full_blocks)
        self.heads, self.head_dim, self.scaling = attention.num_heads, attention.head_dim, attention.scaling
        self.group = visual.spatial_merge_size**2  # patches of one token
        self.tokens = rows * columns

        order = window_order(rows, columns, window)
        self.num_windows = order.shape[0]
        slots = order.flatten()
        real = (slots != _PADDING).repeat_interleave(self.group)  # [S], S patches with their padding
        self.padded = not bool(real.all())
        self.register_buffer("order", slots.clamp(min=0), persistent=False)
        self.register_buffer("places", slots.argsort()[len(slots) - self.tokens :], persistent=False)  # of the tokens
        self.register_buffer("mask", torch.where(real, 0.0, -torch.inf), persistent=False)  # [S]
        self.register_buffer("looks", real.float() / int(real.sum()), persistent=False)  # [S], adds up to 1
        cos, sin = _rotary_tables(visual, rows, columns)
        self.register_buffer("cos", self._arranged(cos[None])[0, :, None], persistent=False)  # [S, 1, head dim]
        self.register_buffer("sin", self._arranged(sin[None])[0, :, None], persistent=False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """``pixel_values [B, N group, values of a patch]`` -> ``image_features [B, N, D]``, ``saliency [B, N]`` (fp32).

        Tokens come and go in raster order; the patches of a token lie together.
        """
        weight = self.patch_embed.proj.weight.flatten(1)  # the convolution sees each patch whole
        hidden_states = self._arranged(F.linear(pixel_values.to(weight.dtype), weight))
        scored = max(self.full_blocks)
        saliency = hidden_states.new_zeros(())
        for index, block in enumerate(self.blocks):
            query, key, value = self._query_key_value(block.attn, block.norm1(hidden_states))
            if index == scored:
                attended, saliency = self._scored_attention(query, key, value)
            elif index in self.full_blocks:
                attended = self._attention(query, key, value, windows=1)
            else:
                attended = self._attention(query, key, value, windows=self.num_windows)
            hidden_states = hidden_states + block.attn.proj(attended)
            hidden_states = hidden_states + block.mlp(block.norm2(hidden_states))
        batch = pixel_values.shape[0]
        merged = self.merger(hidden_states).view(batch, len(self.order), -1)
        grouped = saliency.view(batch, len(self.order), self.group).mean(dim=2)
        return merged[:, self.places], grouped[:, self.places]

    def _arranged(self, patches: Tensor) -> Tensor:
        """Bring ``[B, N group, ...]`` from raster order of tokens into that of the windows, ``[B, S, ...]``."""
        if self.num_windows == 1 and not self.padded:
            return patches
        groups: Tensor = patches.unflatten(1, (self.tokens, self.group))
        return groups[:, self.order].flatten(1, 2)

    def _query_key_value(self, attention: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project and rotate: three tensors ``[B, S, heads, head dim]``."""
        projected = attention.qkv(hidden_states).unflatten(2, (3, self.heads, self.head_dim))
        query, key, value = projected.unbind(2)
        return self._rotated(query), self._rotated(key), value

    def _rotated(self, values: Tensor) -> Tensor:
        wide = values.float()
        first, second = wide.chunk(2, dim=-1)
        return (wide * self.cos + torch.cat((-second, first), dim=-1) * self.sin).to(values.dtype)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *, windows: int) -> Tensor:
        """Attend within each of ``windows`` equal parts of the sequence: ``[B, S, width]``."""
        batch, length = query.shape[:2]
        shape = (batch * windows, length // windows, self.heads, self.head_dim)
        query, key, value = (tensor.reshape(shape).transpose(1, 2) for tensor in (query, key, value))
        mask = None
        if self.padded:
            mask = self.mask.view(1, windows, 1, 1, -1).expand(batch, -1, -1, -1, -1)
            mask = mask.reshape(batch * windows, 1, 1, length // windows).to(query.dtype)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scaling)
        return attended.transpose(1, 2).reshape(batch, length, -1)

    def _scored_attention(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Attend to the whole image: ``[B, S, width]``, and what each patch receives, ``[B, S]``."""
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        scores = (query @ key.transpose(2, 3)).float() * self.scaling + self.mask
        weights = torch.softmax(scores, dim=-1)  # [B, heads, S, S]
        received = self.looks @ weights.mean(dim=1)
        return (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2), received


def window_order(rows: int, columns: int, window: int | None) -> Tensor:
    """Return the tokens of each window, in raster order within it: int64 ``[windows, tokens of a window]``.

    A window at the right or lower edge of a grid that does not divide evenly is filled up with -1.
    """
    grid = torch.arange(rows * columns).view(rows, columns)
    if window is None:
        return grid.view(1, -1)
    grid = F.pad(grid, (0, -columns % window, 0, -rows % window), value=_PADDING)
    tiles = grid.unfold(0, window, window).unfold(1, window, window)  # [rows of windows, columns of them, w, w]
    windows = tiles.reshape(-1, window * window)
    # Within a window the tokens come first and the padding last, as the tower's own order has them.
    return torch.stack([torch.cat((row[row != _PADDING], row[row == _PADDING])) for row in windows])


def _rotary_tables(visual: Any, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every patch, tokens in raster order: fp32 ``[N group, head dim]`` each."""
    merge, rotary = visual.spatial_merge_size, visual.rotary_pos_emb
    grid = torch.tensor([[1, rows * merge, columns * merge]])
    positions = get_vision_position_ids(grid, merge)
    # The module's own frequencies would be rounded in a model that was converted to half precision.
    inverse_frequencies, scaling = rotary.compute_axial_rope_parameters(visual.config)
    angles = positions[..., None].float() * inverse_frequencies
    return tuple(rotary.recomposition_frequencies(table * scaling) for table in (angles.cos(), angles.sin()))
