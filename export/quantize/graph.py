"""The pass over a traced graph that quantizes its matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from promprune.export.checkpoint.weights import CheckpointTensor
from promprune.export.quantize.weights import QuantizedTensor, QuantizedWeight, WeightQuantization

__all__ = ["MIN_OPSET", "quantize_products"]

MIN_OPSET: Final = 21  # the first in which DequantizeLinear takes int4, and blocks


def quantize_products(model: ir.Model, quantization: WeightQuantization) -> int:
    """Quantize the weights of matrix products, in the form that ONNX Runtime and TensorRT have kernels for.

    ``MatMul(x, Transpose(weight [N, K]))`` becomes ``MatMul(x, DequantizeLinear(integers [K, N], scales))``, and
    ``Gemm`` with a bias likewise, with an ``Add`` after it. Weights whose K no block divides stay as they are, and so
    do embeddings and convolutions. Nothing is read or computed: the integers are made when the graph is written.

    Args:
        model: as traced, of at least opset 21; its weights are tensors of a checkpoint.
        quantization: of every weight.

    Returns:
        How many weights were quantized.
    """
    if model.opset_imports.get("", 0) < MIN_OPSET:
        raise RuntimeError(f"a quantized graph needs opset {MIN_OPSET}, not {model.opset_imports.get('')}")
    quantized: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        product = _product_of(node)
        if product is None or quantization.block_of(product.weight.stored.shape[1]) is None:
            continue
        if product.initializer not in quantized:
            quantized[product.initializer] = _dequantized(model.graph, node, product, quantization)
        _replace(model.graph, node, quantized[product.initializer])
    RemoveUnusedNodesPass()(model)
    return len(quantized)


class _Product(NamedTuple):
    """A matrix product with a weight ``[N, K]`` of a checkpoint."""

    initializer: ir.Value
    weight: CheckpointTensor


def _product_of(node: ir.Node) -> _Product | None:
    if node.op_type == "MatMul":
        transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
        source = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
    elif node.op_type == "Gemm" and node.attributes.get_int("transB") and _is_plain(node):
        source = node.inputs[1]
    else:
        return None
    weight = source.const_value if source is not None else None
    if source is None or not isinstance(weight, CheckpointTensor) or len(weight.stored.shape) != 2:
        return None
    return _Product(source, weight)


def _is_plain(gemm: ir.Node) -> bool:
    get = gemm.attributes
    return get.get_float("alpha", 1.0) == get.get_float("beta", 1.0) == 1.0 and not get.get_int("transA")


def _dequantized(graph: ir.Graph, node: ir.Node, product: _Product, quantization: WeightQuantization) -> ir.Value:
    """Insert before ``node`` what dequantizes its weight, and return the weight ``[K, N]``."""
    weight = QuantizedWeight(stored=product.weight.stored, quantization=quantization)
    dtype, name = product.weight.dtype, str(product.initializer.name)
    integers, scales = (_initializer(graph, tensor) for tensor in weight.tensors(name))
    whole_columns = len(scales.shape or ()) == 1
    if scales.dtype != dtype:  # constant: folded when the graph is loaded
        scales = _insert(graph, node, "Cast", [scales], {"to": dtype}, name=f"{name}_scale_{dtype.name.lower()}")
    attributes = {"axis": 1} if whole_columns else {"axis": 0, "block_size": weight.block_size}
    value = _insert(graph, node, "DequantizeLinear", [integers, scales], attributes, name=f"{name}_dequantized")
    value.type, value.shape = ir.TensorType(dtype), integers.shape
    return value


def _initializer(graph: ir.Graph, tensor: QuantizedTensor) -> ir.Value:
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _insert(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any],
    *,
    name: str,
) -> ir.Value:
    """Insert a node of one output and return that output; both are named ``name``."""
    node = ir.node(op_type, inputs, attributes, name=name)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node.outputs[0]


def _replace(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> None:
    """Let a product take a weight ``[K, N]``."""
    if node.op_type == "MatMul":
        node.replace_input_with(1, weight)
        return
    first, _, *bias = node.inputs
    result = _insert(graph, node, "MatMul", [first, weight], {}, name=f"{node.name}_product")
    result.type, result.shape = weight.type, node.outputs[0].shape
    if bias and bias[0] is not None:
        result = _insert(graph, node, "Add", [result, bias[0]], {}, name=f"{node.name}_with_bias")
        result.type, result.shape = weight.type, node.outputs[0].shape
    ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
