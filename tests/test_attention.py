"""The exported attention, compared with torch's own."""

from __future__ import annotations

import pkgutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from promprune.errors import VerificationError
from promprune.export import export_package
from promprune.export.checkpoint.out_of_core import PiecewiseSession
from promprune.export.config import ExportConfig
from promprune.export.graphs.trace import graph_from_module

HEADS, LENGTH, SIZE = 2, 6, 8


class BoolMasked(nn.Module):
    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(states, states + 1, states - 1, attn_mask=mask)


class Scaled(nn.Module):
    """Attention with the model's own scale; None for the usual one."""

    def __init__(self, scale: float | None) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, key, scale=self.scale)


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


def scaled(scale: float | None, dtype: torch.dtype, head_dim: int) -> ir.Model:
    """Attention of ``Scaled``, traced with a dynamic length of the keys."""
    query, key = (torch.randn(2, HEADS, length, head_dim, dtype=dtype) for length in (LENGTH, LENGTH + 1))
    return graph_from_module(
        Scaled(scale).eval(),
        (query, key),
        inputs={"query": {}, "key": {2: "total"}},
        outputs={"attended": {}},
        opset=20,
        dynamic_shapes=({}, {2: Dim("total", min=2)}),
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


@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 4e-3)],
    ids=["fp32", "fp16", "bf16"],
)
def test_the_scale_is_rounded_once(tmp_path: Path, dtype: torch.dtype, tolerance: float, head_dim: int) -> None:
    """Only the queries are scaled; against float64, bf16 computed in fp32 as a verification does."""
    torch.manual_seed(0)
    model = scaled(None, dtype, head_dim)
    assert operators(model).count("Mul") == 1
    ir.save(model, tmp_path / "model.onnx")
    query, key = (torch.randn(2, HEADS, length, head_dim, dtype=dtype) * 2 for length in (LENGTH, 3 * LENGTH))
    exact = Scaled(None)(query.double(), key.double()).numpy()
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    session = PiecewiseSession(tmp_path / "model.onnx")
    attended = session.run(None, {"query": query.to(wide).numpy(), "key": key.to(wide).numpy()})[0]
    assert np.abs(attended - exact).max() <= tolerance * exact.std()


def test_a_scale_of_the_models_own_stays() -> None:
    """The graph contains only the root of it."""
    assert operators(scaled(0.3, torch.bfloat16, 128)).count("Mul") == 2


def test_other_guards_stay() -> None:
    assert "IsNaN" in operators(traced(FloatMasked(), torch.float32))


@pytest.mark.parametrize(
    ("checkpoint", "scored_by"), [("tiny_llava", "clip.cls_attention"), ("tiny_siglip", "siglip.received_attention")]
)
def test_a_wrong_saliency_is_noticed(
    checkpoint: str, scored_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The reference for the saliency does not use any code of the export."""
    source = request.getfixturevalue(checkpoint)
    place = f"promprune.export.families.towers.{scored_by}"
    right = pkgutil.resolve_name(place)
    monkeypatch.setattr(place, lambda attention, hidden_states: right(attention, hidden_states * 0.5))
    with pytest.raises(VerificationError) as caught:
        export_package(ExportConfig(model=str(source), ratio=0.25, vision_only=True, output=tmp_path / "out"))
    failed = {check.name for check in caught.value.checks if not check.passed and not check.advisory}
    assert failed == {"saliency, relative error"}
