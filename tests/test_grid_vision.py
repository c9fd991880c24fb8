"""The vision tower of Qwen2-VL and Qwen2.5-VL on a fixed grid, against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.vision_utils import get_vision_window_index

from promprune.export.families.qwen2_5_vl import GridVisionEncoder, window_order
from tests.support.tiny_models import tiny_qwen2_5_vl, tiny_qwen2_vl

GROUP, PATCH_VALUES = 4, 3 * 2 * 14 * 14


def pixel_values(batch: int, tokens: int) -> torch.Tensor:
    return torch.randn(batch, tokens * GROUP, PATCH_VALUES, generator=torch.Generator().manual_seed(tokens))


def reference(
    model: Any, module: Any, block: int, values: torch.Tensor, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features as transformers computes them, and the eager attention weights of one block [B, heads, S, S]."""
    scored, weights, eager = model.model.visual.blocks[block].attn, [], module.eager_attention_forward

    def recording(layer: Any, *args: Any, **settings: Any) -> Any:
        output = eager(layer, *args, **settings)
        if layer is scored:
            weights.append(output[1])
        return output

    model.set_attn_implementation("eager")
    monkeypatch.setattr(module, "eager_attention_forward", recording)
    grid = torch.tensor([[1, 2 * rows, 2 * columns]] * len(values))
    with torch.no_grad():
        features = model.model.visual(values.flatten(0, 1), grid_thw=grid).pooler_output
    return features.view(len(values), rows * columns, -1), torch.cat(weights)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.std())


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 3), (2, 2), (3, 8)])
def test_the_tower_of_qwen2_5_vl_is_that_of_transformers(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With windows that divide the grid, and with windows cut by its edge."""
    model = tiny_qwen2_5_vl()
    values = pixel_values(2, rows * columns)
    encoder = GridVisionEncoder(model.model.visual, rows=rows, columns=columns, window=2, full_blocks=[0, 1])
    wanted, weights = reference(model, modeling_qwen2_5_vl, 1, values, rows, columns, monkeypatch)
    with torch.no_grad():
        features, saliency = encoder(values)
    assert relative_error(features, wanted) < 1e-5
    received = weights.mean(dim=(1, 2)).view(2, -1, GROUP).mean(dim=2)
    order, _ = get_vision_window_index(torch.tensor([[1, 2 * rows, 2 * columns]]), 2, 56, 14)
    assert relative_error(saliency, received[:, order.argsort()]) < 1e-5
    assert encoder.padded == (rows % 2 == 1 or columns % 2 == 1)


def test_the_tower_of_qwen2_vl_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_qwen2_vl()
    values = pixel_values(2, 15)
    encoder = GridVisionEncoder(model.model.visual, rows=5, columns=3, window=None, full_blocks=range(3))
    wanted, weights = reference(model, modeling_qwen2_vl, 2, values, 5, 3, monkeypatch)
    with torch.no_grad():
        features, saliency = encoder(values)
    assert relative_error(features, wanted) < 1e-5
    assert relative_error(saliency, weights.mean(dim=(1, 2)).view(2, -1, GROUP).mean(dim=2)) < 1e-5


def test_the_rotary_tables_keep_their_precision_in_half() -> None:
    """A model converted to fp16 rounds its own frequencies; the constants of the graph do not."""
    whole, half = (
        GridVisionEncoder(model.model.visual, rows=4, columns=6, window=2, full_blocks=[0, 1])
        for model in (tiny_qwen2_5_vl(), tiny_qwen2_5_vl().half())
    )
    assert torch.equal(whole.cos, half.cos)
    assert torch.equal(whole.sin, half.sin)


def test_windows_by_hand() -> None:
    assert window_order(2, 3, 2).tolist() == [[0, 1, 3, 4], [2, 5, -1, -1]]
    assert window_order(2, 2, None).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("rows", "columns", "window"), [(24, 24, 4), (26, 38, 4), (1, 9, 4), (7, 5, 3)])
def test_windows_are_those_of_transformers(rows: int, columns: int, window: int) -> None:
    wanted, ends = get_vision_window_index(torch.tensor([[1, 2 * rows, 2 * columns]]), 2, 28 * window, 14)
    order = window_order(rows, columns, window)
    assert order[order >= 0].tolist() == wanted.tolist()
    assert (order >= 0).sum(dim=1).tolist() == (ends.diff() // GROUP).tolist()
