"""Qwen2.5-VL: a vision tower with windowed attention, and a decoder with three rotary positions per token.

The exported tower takes a fixed grid: everything that depends on the size of the image (the windows, their masks, the
rotary tables, the permutation back to raster order) is computed once and becomes a constant of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import cached_property
from typing import Any, Final

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids

from promprune.errors import UnsupportedModelError
from promprune.export.families.base import (
    Family,
    Grids,
    ImageTokens,
    SampleInput,
    VisionModule,
    VisionReference,
    single_grid,
)
from promprune.package.image import GridLayout, GridRecord
from promprune.package.manifest import VISION_ENCODER
from promprune.runtime.images.grid import PixelRange, choose_grid

__all__ = ["GridVisionEncoder", "Qwen25VL", "window_order"]

# Side of the default grid, if the image processor allows it: 576 tokens, and a multiple of the window's side.
DEFAULT_SIDE: Final = 24

MAX_ASPECT_RATIO: Final = 200  # the limit of transformers' smart_resize

_PADDING: Final = -1


class GridVisionEncoder(nn.Module):
    """A Qwen2-VL or Qwen2.5-VL vision tower for images of one size, with its projector (the merger).

    Inside the tower the groups of patches that become one token are ordered window by window. Incomplete windows at
    the edge of the grid are filled with masked padding, so that the attention of all windows is one batched product;
    there is no padding if the sides of the grid are multiples of the window's side.

    The tower has no CLS token. The saliency of a token is the attention that its patches receive in the last block
    with full attention: the mean over heads, over all querying patches, and over the token's own patches. It is
    computed in fp32 from the softmax of the block itself.

    Args:
        visual: the tower, as transformers loads it.
        rows, columns: size of the grid of tokens (groups of ``merge_size`` x ``merge_size`` patches).
        window: side of a window, in tokens; None if the tower has no windows.
        full_blocks: indices of the blocks with full attention.
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
        self.group = visual.spatial_merge_size**2  # patches per token
        self.tokens = rows * columns

        order = window_order(rows, columns, window)
        self.num_windows = order.shape[0]
        slots = order.flatten()
        real = (slots != _PADDING).repeat_interleave(self.group)  # [S]; S counts patches and padding
        self.padded = not bool(real.all())
        self.register_buffer("order", slots.clamp(min=0), persistent=False)
        self.register_buffer("places", slots.argsort()[len(slots) - self.tokens :], persistent=False)  # [N]
        self.register_buffer("mask", torch.where(real, 0.0, -torch.inf), persistent=False)  # [S]
        self.register_buffer("looks", real.float() / int(real.sum()), persistent=False)  # [S], adds up to 1
        cos, sin = _rotary_tables(visual, rows, columns)
        self.register_buffer("cos", self._reorder(cos[None])[0, :, None], persistent=False)  # [S, 1, head dim]
        self.register_buffer("sin", self._reorder(sin[None])[0, :, None], persistent=False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """``pixel_values [B, N group, values of a patch]`` -> ``image_features [B, N, D]``, ``saliency [B, N]`` (fp32).

        Input and output tokens are in raster order; the patches of a token are adjacent.
        """
        weight = self.patch_embed.proj.weight.flatten(1)  # the kernel of the convolution covers one patch
        hidden_states = self._reorder(F.linear(pixel_values.to(weight.dtype), weight))
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

    def _reorder(self, patches: Tensor) -> Tensor:
        """Reorder ``[B, N group, ...]`` from raster order to window order, with padding: ``[B, S, ...]``."""
        if self.num_windows == 1 and not self.padded:
            return patches
        groups: Tensor = patches.unflatten(1, (self.tokens, self.group))
        return groups[:, self.order].flatten(1, 2)

    def _query_key_value(self, attention: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute query, key and value with rotary positions: ``[B, S, heads, head dim]`` each."""
        projected = attention.qkv(hidden_states).unflatten(2, (3, self.heads, self.head_dim))
        query, key, value = projected.unbind(2)
        return self._rotate(query), self._rotate(key), value

    def _rotate(self, values: Tensor) -> Tensor:
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
        """Compute full attention ``[B, S, width]``, and the attention that each patch receives, ``[B, S]``."""
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        scores = (query @ key.transpose(2, 3)).float() * self.scaling + self.mask
        weights = torch.softmax(scores, dim=-1)  # [B, heads, S, S]
        received = self.looks @ weights.mean(dim=1)
        return (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2), received


def window_order(rows: int, columns: int, window: int | None) -> Tensor:
    """Return the tokens of each window, in raster order within it: int64 ``[windows, tokens of a window]``.

    Incomplete windows at the right and lower edges of the grid are filled with -1.
    """
    grid = torch.arange(rows * columns).view(rows, columns)
    if window is None:
        return grid.view(1, -1)
    grid = F.pad(grid, (0, -columns % window, 0, -rows % window), value=_PADDING)
    tiles = grid.unfold(0, window, window).unfold(1, window, window)  # [window rows, window columns, w, w]
    windows = tiles.reshape(-1, window * window)
    # Within a window the tokens come first and the padding last, as in the original tower.
    return torch.stack([torch.cat((row[row != _PADDING], row[row == _PADDING])) for row in windows])


def _rotary_tables(visual: Any, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of every patch, tokens in raster order: fp32 ``[N group, head dim]`` each."""
    merge, rotary = visual.spatial_merge_size, visual.rotary_pos_emb
    grid = torch.tensor([[1, rows * merge, columns * merge]])
    positions = get_vision_position_ids(grid, merge)
    # Not the module's frequencies: they are rounded if the model was converted to half precision.
    inverse_frequencies, scaling = rotary.compute_axial_rope_parameters(visual.config)
    angles = positions[..., None].float() * inverse_frequencies
    return tuple(rotary.recomposition_frequencies(table * scaling) for table in (angles.cos(), angles.sin()))


class Qwen25VL(Family):
    """Qwen2.5-VL: one vision graph per grid."""

    model_type = "qwen2_5_vl"
    model_class = "Qwen2_5_VLForConditionalGeneration"
    position_axes = (3,)

    def build_vision_modules(self) -> tuple[VisionModule, ...]:
        """Return the tower and the projector for each grid."""
        self._refuse_sliding_window()
        return tuple(self._vision_module(record) for record in self.grid_records)

    def build_layout(self) -> GridLayout:
        """Return the grids."""
        return GridLayout(token_pixels=self.token_pixels, grids=self.grid_records)

    @property
    def sample_sizes(self) -> tuple[tuple[int, int], ...]:
        """The sizes of the grids."""
        return tuple((rows * self.token_pixels, columns * self.token_pixels) for rows, columns in self.grids)

    @property
    def window(self) -> int | None:
        """Side of an attention window of the tower, in tokens; None if it has no windows."""
        vision = self.config.vision_config
        return int(vision.window_size // vision.patch_size // vision.spatial_merge_size)

    @property
    def full_blocks(self) -> Collection[int]:
        """Indices of the tower's blocks with full attention, at least one."""
        vision = self.config.vision_config
        full = [index for index in vision.fullatt_block_indexes if index < vision.depth]
        if not full:
            raise UnsupportedModelError(
                f"this model has fullatt_block_indexes = {list(vision.fullatt_block_indexes)} in a tower of "
                f"{vision.depth}",
                expected="a block with full attention: the selection uses its attention weights",
            )
        return full

    def choose_grids(self, grids: Grids) -> Grids:
        """Return the requested grids, or else one square grid as close as possible to ``DEFAULT_SIDE``."""
        for rows, columns in grids:
            self._refuse_impossible(rows, columns)
        if grids:
            return grids
        size = self.processor.image_processor.size
        least = math.ceil(math.sqrt(size["shortest_edge"]) / self.token_pixels)
        most = math.floor(math.sqrt(size["longest_edge"]) / self.token_pixels)
        tokens = min(max(DEFAULT_SIDE, least), most)
        return ((tokens, tokens),)

    def resize(self, image: Image.Image) -> Image.Image:
        """Return an image in the size of its grid."""
        size = self.processor.image_processor.size
        pixels = PixelRange(side=self.token_pixels, least=size["shortest_edge"], most=size["longest_edge"])
        height, width = self.sample_sizes[choose_grid(image.height, image.width, self.grids, pixels)]
        return image.resize((width, height), resample=Image.Resampling.BICUBIC)

    def reference(self, image: Image.Image) -> VisionReference:
        """Preprocess and encode one image that has the size of a grid, with transformers."""
        values = self.processor.image_processor(images=[image], return_tensors="pt")
        grid, merge = values["image_grid_thw"], self.processor.image_processor.merge_size
        _, rows, columns = (grid[0] // torch.tensor([1, merge, merge])).tolist()
        features = self.model.get_image_features(values["pixel_values"], grid, return_dict=True).pooler_output
        return VisionReference(
            graph=self.grid_records[self.grids.index((rows, columns))].graph,
            feeds={"pixel_values": values["pixel_values"][None]},
            features=torch.stack(list(features)),
        )

    def image_tokens(self, image: Image.Image, reference: VisionReference) -> ImageTokens:
        """Return the tokens of the grid."""
        rows, columns = next((grid.rows, grid.columns) for grid in self.grid_records if grid.graph == reference.graph)
        return single_grid(rows, columns, image)

    def position_ids(self, input_ids: Tensor, reference: VisionReference) -> Tensor:
        """Return transformers' positions for a prompt with one image that has all its tokens: ``[3, 1, S]``."""
        grid = next(record for record in self.grid_records if record.graph == reference.graph)
        merge = self.config.vision_config.spatial_merge_size
        positions: Tensor = self.model.model.get_rope_index(
            input_ids,
            mm_token_type_ids=(input_ids == self.image_token_id).int(),
            image_grid_thw=torch.tensor([[1, grid.rows * merge, grid.columns * merge]]),
        )[0]
        return positions

    @property
    def token_pixels(self) -> int:
        """Side of the square of pixels that becomes one token."""
        return int(self.processor.image_processor.patch_size * self.processor.image_processor.merge_size)

    @cached_property
    def grid_records(self) -> tuple[GridRecord, ...]:
        """The grids, each with the name of its vision graph."""
        names = [VISION_ENCODER, *(f"{VISION_ENCODER}_{rows}x{columns}" for rows, columns in self.grids[1:])]
        return tuple(
            GridRecord(graph=name, rows=rows, columns=columns)
            for name, (rows, columns) in zip(names, self.grids, strict=True)
        )

    def _vision_module(self, record: GridRecord) -> VisionModule:
        visual, num_tokens = self.model.model.visual, record.rows * record.columns
        patch_values = visual.patch_embed.proj.weight[0].numel()
        sample = torch.zeros(2, num_tokens * visual.spatial_merge_size**2, patch_values)
        return VisionModule(
            name=record.graph,
            module=GridVisionEncoder(
                visual, rows=record.rows, columns=record.columns, window=self.window, full_blocks=self.full_blocks
            ),
            inputs={"pixel_values": SampleInput(sample=sample, dims={0: "batch_size"})},
            num_tokens=num_tokens,
        )

    def _refuse_sliding_window(self) -> None:
        text = self.text_config
        if "sliding_attention" in text.layer_types:
            raise UnsupportedModelError(
                f"this model has a sliding window of {text.sliding_window} tokens", expected="use_sliding_window off"
            )

    def _refuse_impossible(self, rows: int, columns: int) -> None:
        """Refuse a grid that the model's image processor cannot make."""
        if max(rows, columns) > MAX_ASPECT_RATIO * min(rows, columns):
            raise UnsupportedModelError(
                f"received the image grid {rows}x{columns}",
                expected=f"an aspect ratio of at most {MAX_ASPECT_RATIO}: the image processor refuses other images",
                fix="choose another --image-grid",
            )
        size, pixels = self.processor.image_processor.size, self.token_pixels**2
        if not size["shortest_edge"] <= rows * columns * pixels <= size["longest_edge"]:
            least, most = (round(size[name] / pixels) for name in ("shortest_edge", "longest_edge"))
            raise UnsupportedModelError(
                f"received the image grid {rows}x{columns}, {rows * columns} tokens",
                expected=f"{least} to {most} tokens, the range of this model's image processor",
                fix="choose another --image-grid, or change min_pixels or max_pixels in its preprocessor_config.json",
            )
