"""The exported attention, held against torch's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from promprune.export.graphs import graph_from_module

HEADS, LENGTH, SIZE = 2, 6, 8


class BoolMasked(nn.Module):
    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(states, states + 1, states - 1, attn_mask=mask)


class FloatMasked(nn.Module):
    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        added = torch.where(mask, 0.0, -5.0).to(states.dtype)
        weights = torch.softmax(states @ states.mT + added, dim=-1)
        return torch.where(weights.isnan(), 0.0, weights) @ states


def traced(module: nn.Module, dtype: torch.dtype) -> ir.Model:
    states, mask = torch.randn(2, HEADS, LENGTH, SIZE, dtype=dtype), torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool)
    return graph_from_module(
        module.eval(),
        (states, mask),
        inputs={"states": {}, "mask": {}},
        outputs={"attended": {}},
        opset=20,
        dynamic_shapes=None,
    )


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3)], ids=["fp32", "fp16"])
def test_masked_attention_has_no_guard(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    model = traced(BoolMasked(), dtype)
    assert "Softmax" in operators(model)
    assert "IsNaN" not in operators(model)
    ir.save(model, tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])

    states = torch.randn(2, HEADS, LENGTH, SIZE).to(dtype) * 4
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, LENGTH, LENGTH).clone()
    mask[1, :, :, :2] = False  # two positions of padding: their own rows are fully masked
    attended = session.run(None, {"states": states.numpy(), "mask": mask.numpy()})[0]

    expected = BoolMasked()(states.float(), mask).numpy()
    assert np.isfinite(attended).all()
    read = mask.any(-1, keepdim=True).expand(expected.shape).numpy()
    assert not read.all()
    np.testing.assert_allclose(attended[read], expected[read], rtol=tolerance, atol=tolerance * 10)


def test_other_guards_stay() -> None:
    assert "IsNaN" in operators(traced(FloatMasked(), torch.float32))
