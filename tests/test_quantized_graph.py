"""The pass that quantizes the products of a graph, and how ONNX Runtime and TensorRT run its result."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file

from promprune.errors import ModelError
from promprune.export.checkpoint.weights import CheckpointTensor, stored_tensors
from promprune.export.graphs.external_data import ExternalData
from promprune.export.graphs.trace import save_graph
from promprune.export.quantize.graph import quantize_products
from promprune.export.quantize.weights import QuantizedWeight, WeightQuantization
from promprune.runtime.sessions.config import RuntimeConfig
from promprune.runtime.sessions.onnxruntime import OnnxRuntimeSession

INT4 = WeightQuantization(bits=4, block_size=32)
INT8 = WeightQuantization(bits=8, block_size=None)
SEVEN_BITS = WeightQuantization(bits=7, block_size=None)  # of weights that are multiplied by activations in int8
FORMS = {
    "int4": INT4,
    "int4, blocks of 128": WeightQuantization(bits=4, block_size=128),
    "int8": INT8,
    "int8, blocks of 64": WeightQuantization(bits=8, block_size=64),
}


def write_graph(
    folder: Path,
    quantization: WeightQuantization | None,
    *,
    shape: tuple[int, int] = (96, 128),
    op_type: str = "MatMul",
    dtype: torch.dtype = torch.float32,
    int8_activations: bool = False,
) -> tuple[Path, torch.Tensor, int]:
    """Write ``y = x weight^T`` (or ``Gemm`` with a bias of 0.5) as the exporter writes it, quantized.

    Returns:
        The graph's file, the weight ``[N, K]``, and how many weights were quantized.
    """
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.05
    save_file({"weight": weight}, folder / "model.safetensors")
    tensor = CheckpointTensor(stored_tensors(folder)["weight"], dtype, "weight")
    number = tensor.dtype
    value = ir.Value(name="weight", shape=tensor.shape, type=ir.TensorType(number), const_value=tensor)
    x = ir.Value(name="x", shape=ir.Shape(["rows", shape[1]]), type=ir.TensorType(number))
    if op_type == "MatMul":
        transpose = ir.node("Transpose", [value], {"perm": [1, 0]})
        nodes = [transpose, ir.node("MatMul", [x, transpose.outputs[0]])]
        initializers = [value]
    else:
        half = ir.tensor(np.full(shape[0], 0.5, number.numpy()), name="bias")
        bias = ir.Value(name="bias", shape=half.shape, type=ir.TensorType(number), const_value=half)
        nodes = [ir.node("Gemm", [x, value, bias], {"transB": 1})]
        initializers = [value, bias]
    y = nodes[-1].outputs[0]
    y.name, y.shape, y.dtype = "y", ir.Shape(["rows", shape[0]]), number
    graph = ir.Graph([x], [y], nodes=nodes, initializers=initializers, opset_imports={"": 21}, name="product")
    model = ir.Model(graph, ir_version=10)
    count = quantize_products(model, quantization, int8_activations=int8_activations) if quantization else 0
    save_graph(model, "graph", ExternalData(folder=folder, links={}))
    return folder / "graph.onnx", weight, count


def opened(path: Path, accuracy_level: int = 0) -> tuple[ort.InferenceSession, list[str]]:
    """Load a graph; returns the operators that it was fused into as well."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
    return session, [node.op_type for node in optimized.graph.node]


def dequantized(path: Path, quantization: WeightQuantization) -> np.ndarray[Any, Any]:
    stored = stored_tensors(path.parent)["weight"]
    return QuantizedWeight(stored=stored, quantization=quantization).read().numpy()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op_type", ["MatMul", "Gemm"])
def test_a_product_is_fused_and_exact(tmp_path: Path, form: str, op_type: str) -> None:
    path, weight, count = write_graph(tmp_path, FORMS[form], op_type=op_type)
    session, operators = opened(path)
    assert count == 1
    assert operators == ["MatMulNBits"]  # with the bias
    x = np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
    wanted = x @ dequantized(path, FORMS[form]).T + (0.5 if op_type == "Gemm" else 0)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], wanted, atol=2e-6)
    error = np.linalg.norm(dequantized(path, FORMS[form]) - weight.numpy()) / np.linalg.norm(weight.numpy())
    assert error < (0.11 if form.startswith("int4") else 0.01)


def test_the_runtimes_accuracy_level_is_less_exact(tmp_path: Path) -> None:
    path, _, _ = write_graph(tmp_path, INT4)
    x = np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
    exact, fast = (opened(path, level)[0].run(None, {"x": x})[0] for level in (0, 4))
    assert 1e-4 < np.abs(exact - fast).max() / exact.std() < 0.05


@pytest.mark.parametrize("shape", [(7, 48), (33, 16), (96, 80), (1, 128)])
@pytest.mark.parametrize("form", ["int4", "int8"])
def test_odd_shapes_take_smaller_blocks(tmp_path: Path, shape: tuple[int, int], form: str) -> None:
    path, _, count = write_graph(tmp_path, FORMS[form], shape=shape)
    session, _ = opened(path)
    x = np.random.default_rng(0).standard_normal((3, shape[1])).astype(np.float32)
    assert count == 1
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ dequantized(path, FORMS[form]).T, atol=2e-6)


def test_a_weight_that_no_block_divides_stays_as_it_is(tmp_path: Path) -> None:
    path, weight, count = write_graph(tmp_path, INT4, shape=(96, 100))
    assert count == 0
    x = np.random.default_rng(0).standard_normal((3, 100)).astype(np.float32)
    np.testing.assert_allclose(opened(path)[0].run(None, {"x": x})[0], x @ weight.numpy().T, atol=2e-6)


def test_integers_take_an_eighth_and_scales_a_sixteenth_of_fp32(tmp_path: Path) -> None:
    path, _, _ = write_graph(tmp_path, INT4, shape=(1024, 1024))
    size = path.with_name("graph.onnx_data").stat().st_size
    assert size == pytest.approx(1024 * 1024 * (1 / 2 + 2 / 32), abs=8192)


def test_weights_of_fp16_graphs_have_their_scales_without_a_cast(tmp_path: Path) -> None:
    path, _, _ = write_graph(tmp_path, INT4, dtype=torch.float16)
    assert [node.op_type for node in onnx.load(path).graph.node] == ["DequantizeLinear", "MatMul"]


def test_nan_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"weight": torch.full((4, 32), float("nan"))}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="weight has values that are NaN or infinite"):
        QuantizedWeight(stored=stored_tensors(tmp_path)["weight"], quantization=INT4).read()


@functools.cache
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX")


@pytest.mark.parametrize("target", ["SM86", "SM89", "SM120"])
@pytest.mark.parametrize("form", ["int4", "int8"])
def test_tensorrt_for_rtx_keeps_the_integers(tmp_path: Path, form: str, target: str) -> None:
    """The engine of a weight of 4 MB in fp32 has about the size of its integers and scales."""
    trt = rtx()
    path, weight, _ = write_graph(tmp_path, FORMS[form], shape=(1024, 1024))
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse_from_file(str(path)), parser.get_error(0).desc()
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, 1024), (4, 1024), (64, 1024))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    assert engine.nbytes < weight.numel() * {"int4": 0.82, "int8": 1.1}[form]


def int8_graph(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    path, _, count = write_graph(folder, SEVEN_BITS, op_type="Gemm", dtype=dtype, int8_activations=True)
    assert count == 1
    return path


def quantized_rows(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Round every row to multiples of 1/127 of its largest magnitude, in float64."""
    step = np.maximum(np.abs(x.astype(np.float64)).max(-1, keepdims=True) / 127, 1e-12)
    return np.round(x / step) * step


def test_activations_in_int8_have_a_scale_per_row(tmp_path: Path) -> None:
    path = int8_graph(tmp_path)
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((6, 128)) * 10.0 ** np.arange(-3, 3)[:, None]).astype(np.float32)
    x[2] = 0
    got = opened(path)[0].run(None, {"x": x})[0]
    wanted = quantized_rows(x) @ dequantized(path, SEVEN_BITS).T + 0.5
    scale = np.abs(wanted - 0.5).max(-1, keepdims=True) + 1e-9
    np.testing.assert_allclose((got - wanted) / scale, np.zeros_like(wanted), atol=2e-4)
    np.testing.assert_array_equal(got[2], np.full(96, 0.5, np.float32))


def test_an_image_has_the_same_features_in_any_batch(tmp_path: Path) -> None:
    session, _ = opened(int8_graph(tmp_path))
    x = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)
    x[0] *= 1000
    np.testing.assert_array_equal(session.run(None, {"x": x})[0][1:], session.run(None, {"x": x[1:]})[0])


def test_activations_of_fp16_graphs_do_not_overflow(tmp_path: Path) -> None:
    path = int8_graph(tmp_path, torch.float16)
    x = np.full((2, 128), 100, np.float16)
    got = opened(path)[0].run(None, {"x": x})[0]
    wanted = x.astype(np.float64) @ dequantized(path, SEVEN_BITS).T + 0.5
    np.testing.assert_allclose(got.astype(np.float64), wanted, rtol=2e-3, atol=0.5)


def test_vision_weights_are_expanded_on_a_cpu(tmp_path: Path) -> None:
    path, _, _ = write_graph(tmp_path, INT8)
    x = np.random.default_rng(0).standard_normal((40, 128)).astype(np.float32)
    config = RuntimeConfig(provider="cpu")
    outputs = [OnnxRuntimeSession(path, config, expand_weights=expand).run({"x": x})["y"] for expand in (True, False)]
    exact = x @ dequantized(path, INT8).T
    errors = [float(np.abs(y - exact).max()) for y in outputs]
    assert errors[0] < 2e-6 < 1e-4 < errors[1]  # the other one rounds activations to int8
