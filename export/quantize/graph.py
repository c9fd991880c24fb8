"""The pass over a traced graph that stores the weights of its matrix products in another format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from promprune.dtypes import Dtype
from promprune.export.checkpoint.weights import CheckpointTensor, LazyWeight, torch_dtype
from promprune.export.graphs.opset import QUANTIZED_OPSET
from promprune.export.quantize.weights import QuantizedWeight, WeightQuantization
from promprune.package.manifest import WeightRecord

__all__ = ["LARGEST", "LEAST_STEP", "QUANTIZED_SUFFIX", "format_products", "quantize_products"]

QUANTIZED_SUFFIX: Final = "_quantized"  # appended to the name of a weight for its integers
LARGEST: Final = 127  # activations in int8 lie between -127 and 127 ...
ZERO_POINT: Final = np.uint8(128)  # ... and are stored as uint8, for which CPUs without VNNI have an instruction
LEAST_STEP: Final = np.float32(1e-12)  # of a row of zeros


def format_products(model: ir.Model, record: WeightRecord, dtype: Dtype) -> ir.Model:
    """Store the weights of matrix products in the format of a package's record, and return the graph.

    Args:
        model: the traced graph, with opset 21 or later if it is to be quantized; its weights are tensors of a
            checkpoint.
        record: the record of these weights.
        dtype: dtype of the package.
    """
    if record.is_quantized:
        quantize_products(model, WeightQuantization.of(record, dtype), int8_activations=record.int8_activations)
    elif record.format != dtype:
        _cast_weights(model, torch_dtype(record.format))
    return model


def quantize_products(model: ir.Model, quantization: WeightQuantization, *, int8_activations: bool = False) -> int:
    """Quantize the weights of matrix products, in the form that ONNX Runtime and TensorRT have kernels for.

    ``MatMul(x, Transpose(weight [N, K]))`` becomes ``MatMul(x, DequantizeLinear(integers [K, N], scales))``, and
    ``Gemm`` with a bias the same, followed by an ``Add``. Embeddings, convolutions, and weights whose K is not
    divisible by any block size are not changed. Nothing is read or computed yet: the integers are computed when the
    graph is written.

    Args:
        model: the traced graph, with opset 21 or later; its weights are tensors of a checkpoint.
        quantization: how every weight is quantized.
        int8_activations: also quantize ``x`` at run time, with one scale per row (token): ``QuantizeLinear``,
            ``MatMulInteger``, and a multiplication by both scales. For ONNX Runtime on CPUs.

    Returns:
        The number of quantized products.
    """
    if model.opset_imports.get("", 0) < QUANTIZED_OPSET:
        raise RuntimeError(f"a quantized graph needs opset {QUANTIZED_OPSET}, not {model.opset_imports.get('')}")
    products = [p for p in _products(model.graph) if quantization.block_of(p.weight.stored.shape[1]) is not None]
    writer = _Writer(model.graph, quantization)
    for product in products:
        multiply = writer.integer_product if int8_activations else writer.product
        _replace(model.graph, product, multiply(product))
    RemoveUnusedNodesPass()(model)
    return len(products)


class _Product(NamedTuple):
    """A node that multiplies ``x`` by a weight ``[N, K]`` of a checkpoint and may add a bias."""

    node: ir.Node
    x: ir.Value
    initializer: ir.Value
    weight: CheckpointTensor
    bias: ir.Value | None


def _products(graph: ir.Graph) -> Iterator[_Product]:
    for node in graph:
        x, source, *bias = node.inputs if node.op_type in ("MatMul", "Gemm") else (None, None)
        if node.op_type == "MatMul":
            transpose = source.producer() if source is not None else None
            source = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
        elif node.op_type == "Gemm" and not _is_linear(node):
            continue
        weight = source.const_value if source is not None else None
        if x is not None and source is not None and isinstance(weight, CheckpointTensor) and weight.shape.rank() == 2:
            yield _Product(node, x, source, weight, bias[0] if bias else None)


def _is_linear(gemm: ir.Node) -> bool:
    get = gemm.attributes
    plain = get.get_float("alpha", 1.0) == get.get_float("beta", 1.0) == 1.0 and not get.get_int("transA")
    return plain and bool(get.get_int("transB"))


class _Writer:
    """Inserts the nodes that multiply by quantized weights; shared weights and activations are quantized once."""

    def __init__(self, graph: ir.Graph, quantization: WeightQuantization) -> None:
        self._graph = graph
        self._quantization = quantization
        self._parts: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._dequantized: dict[ir.Value, ir.Value] = {}
        self._activations: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def product(self, product: _Product) -> ir.Value:
        """Multiply by the dequantized weight."""
        weight = product.initializer
        if weight not in self._dequantized:
            integers, scales = self._integers_and_scales(product, product.weight.dtype)
            block_size = self._quantization.block_of(product.weight.stored.shape[1])
            attributes = {"axis": 1} if len(scales.shape or ()) == 1 else {"axis": 0, "block_size": block_size}
            inputs, name = [integers, scales], f"{weight.name}_dequantized"
            self._dequantized[weight] = self._insert(product, "DequantizeLinear", inputs, attributes, name=name)
        return self._insert(product, "MatMul", [product.x, self._dequantized[weight]], name=product.node.name)

    def integer_product(self, product: _Product) -> ir.Value:
        """Quantize each row of ``x``, multiply the integers, and multiply by the scales of the row and the column."""
        name, dtype = str(product.node.name), product.weight.dtype
        if product.x not in self._activations:
            self._activations[product.x] = self._quantized_rows(product)
        values, row_scales = self._activations[product.x]
        integers, scales = self._integers_and_scales(product, ir.DataType.FLOAT)
        sums = self._insert(
            product,
            "MatMulInteger",
            [values, integers, self._constant("uint8_zero", ZERO_POINT)],
            name=f"{name}_integers",
        )
        floats = self._insert(product, "Cast", [sums], {"to": ir.DataType.FLOAT}, name=f"{name}_sums")
        rows = self._insert(product, "Mul", [floats, row_scales], name=f"{name}_rows")
        result = self._insert(product, "Mul", [rows, scales], name=name if _is_fp32(dtype) else f"{name}_fp32")
        return result if _is_fp32(dtype) else self._insert(product, "Cast", [result], {"to": dtype}, name=name)

    def _quantized_rows(self, product: _Product) -> tuple[ir.Value, ir.Value]:
        """Return ``x`` as integers around ``ZERO_POINT``, and the scale of each row, ``[..., 1]`` in fp32."""
        x, name = product.x, f"{product.x.name}_row"
        if not _is_fp32(product.weight.dtype):
            x = self._insert(product, "Cast", [x], {"to": ir.DataType.FLOAT}, name=f"{name}_fp32")
        last = self._constant("last_axis", np.array([-1]))
        largest = self._insert(product, "Abs", [x], name=f"{name}_abs")
        largest = self._insert(product, "ReduceMax", [largest, last], {"keepdims": 1}, name=f"{name}_max")
        step = self._constant("activation_step", np.float32(1 / LARGEST))
        scale = self._insert(product, "Mul", [largest, step], name=f"{name}_step")
        least = self._constant("least_activation_step", LEAST_STEP)
        scale = self._insert(product, "Max", [scale, least], name=f"{name}_scale")
        steps = self._insert(product, "Div", [x, scale], name=f"{name}_steps")
        one, zero = self._constant("one_step", np.float32(1)), self._constant("uint8_zero", ZERO_POINT)
        return self._insert(product, "QuantizeLinear", [steps, one, zero], name=f"{name}_quantized"), scale

    def _constant(self, name: str, value: np.ndarray[Any, Any] | np.generic) -> ir.Value:
        name = f"int8_activations/{name}"
        if name not in self._graph.initializers:
            tensor = ir.tensor(np.asarray(value), name=name)
            shape, dtype = ir.Shape(np.shape(value)), ir.TensorType(tensor.dtype)
            self._graph.register_initializer(ir.Value(name=name, shape=shape, type=dtype, const_value=tensor))
        return self._graph.initializers[name]

    def _integers_and_scales(self, product: _Product, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
        """Return the integers of a weight, and its scales in ``dtype``, as values of the graph."""
        key = product.initializer
        if key not in self._parts:
            weight = QuantizedWeight(stored=product.weight.stored, quantization=self._quantization)
            integers, scales = (self._initializer(tensor) for tensor in weight.tensors(str(key.name)))
            shape = scales.shape
            if scales.dtype != dtype:  # constant: folded when the graph is loaded
                name = f"{scales.name}_{dtype.name.lower()}"
                scales = self._insert(product, "Cast", [scales], {"to": dtype}, name=name)
                scales.type, scales.shape = ir.TensorType(dtype), shape
            self._parts[key] = integers, scales
        return self._parts[key]

    def _initializer(self, tensor: LazyWeight) -> ir.Value:
        value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _insert(
        self,
        product: _Product,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: dict[str, Any] | None = None,
        *,
        name: str | None,
    ) -> ir.Value:
        return _insert(self._graph, product.node, op_type, inputs, attributes, name=name)


def _is_fp32(dtype: ir.DataType) -> bool:
    return dtype == ir.DataType.FLOAT


def _insert(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value],
    attributes: dict[str, Any] | None = None,
    *,
    name: str | None,
) -> ir.Value:
    """Insert a node of one output and return that output; both have the name ``name``."""
    node = ir.node(op_type, inputs, attributes, name=name)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node.outputs[0]


def _replace(graph: ir.Graph, product: _Product, result: ir.Value) -> None:
    """Replace a product by ``result``, after adding its bias."""
    old = product.node.outputs[0]
    if product.bias is not None:
        result = _insert(graph, product.node, "Add", [result, product.bias], name=f"{product.node.name}_biased")
    result.type, result.shape = old.type, old.shape
    name = old.name
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    graph.remove(product.node, safe=True)
    result.name = name


def _cast_weights(model: ir.Model, dtype: torch.dtype) -> None:
    """Store the weights of products in another floating-point dtype, and cast them in the graph."""
    for product in list(_products(model.graph)):
        old = product.initializer
        if old.name in model.graph.initializers:
            tensor = CheckpointTensor(product.weight.stored, dtype, str(old.name))
            del model.graph.initializers[str(old.name)]
            value = ir.Value(name=old.name, shape=old.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            model.graph.register_initializer(value)
            first = next(node for node in model.graph if old in node.inputs)
            cast = _insert(model.graph, first, "Cast", [value], {"to": product.weight.dtype}, name=f"{old.name}_cast")
            cast.type, cast.shape = old.type, old.shape
            ir.convenience.replace_all_uses_with(old, cast)
