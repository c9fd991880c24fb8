"""Packages with quantized weights: exported, verified, and refused if a graph is not what it should be."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from promprune.errors import ConfigError
from promprune.export import ExportResult
from promprune.export.checkpoint.loading import load_checkpoint
from promprune.export.config import ExportConfig, default_output
from promprune.export.verify.verification import verify_package
from promprune.package.describe import describe_weights
from promprune.package.manifest import (
    DECODER,
    VISION_ENCODER,
    WeightRecord,
    WeightsRecord,
    file_records,
    read_manifest,
    write_manifest,
)
from promprune.package.package import Package
from promprune.runtime import VisionLanguagePipeline
from tests.support.shared import Shared

INT4 = WeightRecord(format="int4", block_size=32)
INT8 = WeightRecord(format="int8")


@pytest.fixture(scope="module")
def int4_export(tiny_llava: Path, shared: Shared) -> ExportResult:
    """The tiny LLaVA with a language model in int4 and a vision encoder in int8, verified."""
    return shared.export("tiny-int4", tiny_llava, ratio=0.25, weight_format="int4")


def test_the_manifest_names_the_formats_and_a_higher_opset(int4_export: ExportResult) -> None:
    manifest = read_manifest(int4_export.output)
    assert manifest.weights == WeightsRecord(language=INT4, vision=INT8)
    assert manifest.opset == 21
    assert describe_weights(manifest) == "fp32, weights int4/32 (vision int8)"


def test_the_embedding_keeps_the_dtype_and_everything_else_is_quantized(int4_export: ExportResult) -> None:
    for name, dtype in ((DECODER, onnx.TensorProto.INT4), (VISION_ENCODER, onnx.TensorProto.INT8)):
        graph = onnx.load(int4_export.output / f"onnx/{name}.onnx", load_external_data=False).graph
        products = [t for t in graph.initializer if t.data_type == dtype]
        left = [t.name for t in graph.initializer if len(t.dims) == 2 and t.data_type == onnx.TensorProto.FLOAT]
        assert products
        assert not [name for name in left if name.endswith(".weight") and "position_embedding" not in name]
    embedding = onnx.load(int4_export.output / "onnx/embed_tokens.onnx").graph.initializer
    assert {t.data_type for t in embedding} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


def test_verification_tells_the_graphs_from_the_cost_of_quantization(int4_export: ExportResult) -> None:
    verification = int4_export.manifest.verification
    assert verification is not None
    assert verification.passed
    costs = {check.name: check for check in verification.checks if check.name.startswith("cost of quantization")}
    assert len(costs) == 4
    assert all(check.advisory for check in costs.values())
    logits = next(check for check in verification.checks if check.name.startswith("prefill logits"))
    assert logits.measured < 1e-4


@pytest.mark.parametrize("fault", ["scale", "block size", "axis", "integers"])
def test_a_planted_fault_fails(int4_export: ExportResult, tiny_llava: Path, tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "package"
    shutil.copytree(int4_export.output, folder)
    path = folder / f"onnx/{DECODER}.onnx"
    model = onnx.load(path)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    node = next(node for node in model.graph.node if node.op_type == "DequantizeLinear")
    scales = initializers[next(name for name in initializers if name == node.input[0].replace("quantized", "scale"))]
    values = onnx.numpy_helper.to_array(scales)
    if fault == "scale":
        scales.CopyFrom(onnx.numpy_helper.from_array(values * np.float16(1.05), scales.name))
    elif fault == "block size":
        next(a for a in node.attribute if a.name == "block_size").i *= 2
        scales.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values[::2]), scales.name))
    elif fault == "axis":  # the first weight is square
        next(a for a in node.attribute if a.name == "axis").i = 1
        scales.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values.T), scales.name))
    else:
        integers = initializers[node.input[0]]
        rolled = np.roll(onnx.numpy_helper.to_array(integers).astype(np.int8), 1, axis=0)
        packed = onnx.helper.make_tensor(integers.name, onnx.TensorProto.INT4, integers.dims, rolled.ravel())
        integers.CopyFrom(packed)
    path.with_name(f"{path.name}_data").unlink()
    onnx.save(model, path)
    graphs = dict(int4_export.manifest.graphs)
    graphs[DECODER] = msgspec.structs.replace(graphs[DECODER], weights=())
    manifest = msgspec.structs.replace(int4_export.manifest, graphs=graphs, files=file_records(folder))
    write_manifest(folder, manifest)
    verification = verify_package(Package(folder, manifest), load_checkpoint(str(tiny_llava)), num_images=1)
    assert not verification.passed
    assert [check.name for check in verification.checks if not check.passed and "logits" in check.name]


def test_the_runtime_says_how_it_multiplies(int4_export: ExportResult) -> None:
    for level, words in ((4, "at accuracy level 4"), (0, "exactly")):
        with VisionLanguagePipeline.from_package(int4_export.output, provider="cpu", accuracy_level=level) as pipeline:
            assert f"decoder_model_merged: quantized weights are multiplied {words}" in pipeline.notes
            expanded = "on a CPU, quantized weights are converted to floating point when the graph is loaded"
            assert f"vision_encoder: {expanded}" in pipeline.notes


@pytest.mark.slow
def test_activations_in_int8_are_verified(shared: Shared) -> None:
    result = shared.export("embedded-int8", weight_format="int8", vision_int8_activations=True)
    assert result.manifest.verification is not None
    assert result.manifest.verification.passed
    measured = {check.name: check.measured for check in result.manifest.verification.checks}
    assert 1e-4 < measured["image features, rms error"] < 0.05
    with VisionLanguagePipeline.from_package(result.output, provider="cpu") as pipeline:
        assert "vision_encoder: activations are rounded to int8" in pipeline.notes


def test_formats_follow_from_one_another() -> None:
    assert ExportConfig().weights() == WeightsRecord(
        language=WeightRecord(format="fp32"), vision=WeightRecord(format="fp32")
    )
    assert ExportConfig(weight_format="int4").weights() == WeightsRecord(language=INT4, vision=INT8)
    assert ExportConfig(weight_format="int8").weights() == WeightsRecord(language=INT8, vision=INT8)
    chosen = ExportConfig(weight_format="int4", vision_weight_format="fp16", block_size=128).weights()
    assert chosen.language.block_size == 128
    assert chosen.vision == WeightRecord(format="fp16")
    assert default_output(ExportConfig(weight_format="int4")).name == "promprune-embedded-0.12-int4"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_format": "int3"}, "received weight_format = 'int3'; expected one of fp32, fp16, bf16, int8, int4"),
        ({"block_size": 48}, "received block_size = 48; expected one of 16, 32, 64, 128"),
        ({"vision_int8_activations": True}, "expected vision weights in int8; add --vision-weight-format int8"),
        ({"weight_format": "int4", "copy_weights": False}, "received --link-weights for quantized weights"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ExportConfig(**settings)  # type: ignore[arg-type]
    assert message in str(refused.value)


def test_formats_are_described_if_they_differ_from_the_dtype(int4_export: ExportResult) -> None:
    plain = msgspec.structs.replace(int4_export.manifest, weights=ExportConfig().weights())
    assert describe_weights(plain) == "fp32"


def test_the_graphs_are_verified_out_of_core_too(
    int4_export: ExportResult, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promprune.export.verify.verification.available_memory", lambda: 0)
    verification = verify_package(int4_export.package, load_checkpoint(str(tiny_llava)))
    assert verification.passed
    assert "what quantization costs" in verification.not_verified
