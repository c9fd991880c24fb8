"""Qwen2.5-VL: a vision tower of windows for images of any size, a decoder with three rotary positions per token.

The tower takes a fixed grid here: everything that depends on the size of the image (the windows, their masks, the
rotary tables, the way back to raster order) is computed once and becomes a constant of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Final

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids

from promprune.errors import UnsupportedModelError
from promprune.export.families.base import AdaptedModel, Grids, SampleInput, VisionGraph, VisionReference
from promprune.package.image import GridLayout, GridRecord
from promprune.package.manifest import VISION_ENCODER

__all__ = [
    "GridVisionEncoder",
    "adapt",
    "adapted_with_grids",
    "default_grids",
    "kept_features",
    "position_ids",
    "reference",
    "window_order",
]

# Side of the grid that is exported when none is asked for, where the image processor allows it: 576 tokens, and
# whole windows only.
DEFAULT_SIDE: Final = 24

MAX_ASPECT_RATIO: Final = 200  # of transformers' smart_resize

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


def adapt(model: Any, processor: Any, grids: Grids) -> AdaptedModel:
    """Take a ``Qwen2_5_VLForConditionalGeneration`` apart, for images of some sizes.

    Raises:
        UnsupportedModelError: its language model attends within a sliding window, its tower nowhere to the whole
            image, or its image processor never makes images of such a size.
    """
    vision = model.config.vision_config
    full = [index for index in vision.fullatt_block_indexes if index < vision.depth]
    if not full:
        raise UnsupportedModelError(
            f"this model has fullatt_block_indexes = {list(vision.fullatt_block_indexes)} in a tower of {vision.depth}",
            expected="a block that attends to the whole image: the selection reads its attention",
        )
    window = vision.window_size // vision.patch_size // vision.spatial_merge_size
    return adapted_with_grids(model, processor, grids, window=window, full_blocks=full)


def adapted_with_grids(
    model: Any, processor: Any, grids: Grids, *, window: int | None, full_blocks: Collection[int]
) -> AdaptedModel:
    """Take a Qwen2-VL or Qwen2.5-VL apart; see :class:`GridVisionEncoder` for ``window`` and ``full_blocks``.

    Raises:
        UnsupportedModelError: as in :func:`adapt`.
    """
    text, visual = model.config.text_config, model.model.visual
    if "sliding_attention" in text.layer_types:
        raise UnsupportedModelError(
            f"this model has a sliding window of {text.sliding_window} tokens", expected="use_sliding_window off"
        )
    side = _token_pixels(processor)
    for rows, columns in grids:
        _refuse_impossible(rows, columns, processor)
    records = tuple(
        GridRecord(
            graph=VISION_ENCODER if number == 0 else f"{VISION_ENCODER}_{rows}x{columns}", rows=rows, columns=columns
        )
        for number, (rows, columns) in enumerate(grids)
    )
    values = visual.patch_embed.proj.weight[0].numel()
    graphs = tuple(
        VisionGraph(
            name=record.graph,
            module=GridVisionEncoder(
                visual, rows=record.rows, columns=record.columns, window=window, full_blocks=full_blocks
            ),
            inputs={
                "pixel_values": SampleInput(
                    sample=torch.zeros(2, record.rows * record.columns * visual.spatial_merge_size**2, values),
                    dims={0: "batch_size"},
                )
            },
            num_tokens=record.rows * record.columns,
        )
        for record in records
    )
    return AdaptedModel(
        vision_graphs=graphs,
        embed_tokens=model.model.language_model.embed_tokens,
        language_model=model.model.language_model,
        lm_head=model.lm_head,
        text_config=text,
        layout=GridLayout(token_pixels=side, grids=records),
        sample_sizes=tuple((rows * side, columns * side) for rows, columns in grids),
        image_token_id=model.config.image_token_id,
        position_axes=(3,),
    )


def default_grids(processor: Any) -> Grids:
    """Return one square grid of ``DEFAULT_SIDE``, or the nearest that the image processor makes."""
    size, side = processor.image_processor.size, _token_pixels(processor)
    least = math.ceil(math.sqrt(size["shortest_edge"]) / side)
    most = math.floor(math.sqrt(size["longest_edge"]) / side)
    tokens = min(max(DEFAULT_SIDE, least), most)
    return ((tokens, tokens),)


def reference(model: Any, processor: Any, image: Image.Image, adapted: AdaptedModel) -> VisionReference:
    """Preprocess and encode one image of the size of a grid with transformers."""
    values = processor.image_processor(images=[image], return_tensors="pt")
    grid, merge = values["image_grid_thw"], processor.image_processor.merge_size
    _, rows, columns = (grid[0] // torch.tensor([1, merge, merge])).tolist()
    features = model.get_image_features(values["pixel_values"], grid, return_dict=True).pooler_output
    return VisionReference(
        graph=_grid(adapted, rows=rows, columns=columns).graph,
        feeds={"pixel_values": values["pixel_values"][None]},
        features=torch.stack(list(features)),
    )


def kept_features(model: Any, reference: VisionReference, token_indices: Tensor) -> Tensor:
    """Return the features of the kept tokens, ``[T, D]``."""
    return reference.features[0, token_indices]


def position_ids(model: Any, adapted: AdaptedModel, input_ids: Tensor, reference: VisionReference) -> Tensor:
    """Place the tokens of a prompt with one whole image as transformers does: ``[3, 1, S]``."""
    grid = _grid(adapted, graph=reference.graph)
    merge = model.config.vision_config.spatial_merge_size
    positions: Tensor = model.model.get_rope_index(
        input_ids,
        mm_token_type_ids=(input_ids == adapted.image_token_id).int(),
        image_grid_thw=torch.tensor([[1, grid.rows * merge, grid.columns * merge]]),
    )[0]
    return positions


def _grid(adapted: AdaptedModel, **wanted: Any) -> GridRecord:
    assert isinstance(adapted.layout, GridLayout)  # as this family makes it
    return next(
        grid for grid in adapted.layout.grids if all(getattr(grid, name) == value for name, value in wanted.items())
    )


def _token_pixels(processor: Any) -> int:
    return int(processor.image_processor.patch_size * processor.image_processor.merge_size)


def _refuse_impossible(rows: int, columns: int, processor: Any) -> None:
    size, side = processor.image_processor.size, _token_pixels(processor)
    if max(rows, columns) > MAX_ASPECT_RATIO * min(rows, columns):
        raise UnsupportedModelError(
            f"received the image grid {rows}x{columns}",
            expected=f"at most {MAX_ASPECT_RATIO} times as long as wide: the image processor refuses other images",
            fix="choose another --image-grid",
        )
    pixels = rows * columns * side**2
    if not size["shortest_edge"] <= pixels <= size["longest_edge"]:
        least, most = (round(size[name] / side**2) for name in ("shortest_edge", "longest_edge"))
        raise UnsupportedModelError(
            f"received the image grid {rows}x{columns}, {rows * columns} tokens",
            expected=f"{least} to {most} tokens, what the image processor of this model makes",
            fix="choose another --image-grid, or change min_pixels or max_pixels in its preprocessor_config.json",
        )
