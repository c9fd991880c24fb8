"""Passes that make exported attention as fast and as exact as the attention that the model computes.

Below opset 23, ``scaled_dot_product_attention`` is exported with the square root of its scale on both sides, each
rounded to the model's dtype::

    MatMul(Mul(query, root), Mul(key, root))

In bfloat16 the scale of 128 dimensions is then 0.29 % off. Applying the full scale to the query alone, rounded once,
is 0.01 % off and saves a pass over every cached key. Nothing can overflow: the query becomes smaller, and the key is
the cached value itself.

A masked attention is exported with a mask of the lowest number of its dtype, and with a guard after the softmax that
replaces the NaN of a fully masked row by zero::

    Softmax(scores + Where(mask, 0, lowest)) -> Where(IsNaN(weights), 0, weights)

Only rows of padding are fully masked, and their results are never used. With half that number as the mask nothing
overflows: rows of padding get finite weights, all other rows have the same weights as before (``exp`` of the mask is
zero), and the guard is unnecessary. It costs two passes over ``[B, heads, S, P + S]`` in every layer, and prevents
engines from fusing the attention.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["RemoveNanGuards", "ScaleQueriesOnly"]

ROOT_TOLERANCE: Final = 1e-6  # relative error of the root of a scale in fp32, which may be rounded more than once


class ScaleQueriesOnly(ir.passes.InPlacePass):
    """Multiply the queries of exported attention by the full scale, and leave the keys unscaled.

    Done only if the scale is ``head_dim ** -0.5``, which is known exactly. Of any other scale the graph contains only
    the rounded root, which then stays on both sides.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Scale the queries of every product with a key."""
        modified = False
        for node in [node for node in model.graph if node.op_type == "MatMul"]:
            query, key = (_match_scaling(value) for value in node.inputs)
            if query is None or key is None or not _have_root_of_scale(query, key):
                continue
            name = f"{query.factor.name}_of_{query.head_dim}_whole"
            whole = _constant(model.graph, name, query.head_dim**-0.5, query.root)
            query.node.replace_input_with(query.node.inputs.index(query.factor), whole)
            node.replace_input_with(1, key.value)
            modified = True
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


class _Scaled(NamedTuple):
    """``node`` is ``Mul(value [..., head_dim or L], factor)`` with a single use; ``root`` is the constant factor."""

    node: ir.Node
    value: ir.Value
    factor: ir.Value
    root: ir.TensorProtocol

    @property
    def head_dim(self) -> int:
        """The last dimension of a query; 0 if it is not known."""
        size = self.value.shape[-1] if self.value.shape is not None and len(self.value.shape) else None
        return size if isinstance(size, int) else 0


def _match_scaling(value: ir.Value | None) -> _Scaled | None:
    """Return the parts of ``value`` if it is a product with a constant scalar and is used once, else None."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != "Mul" or len(value.uses()) != 1 or value.is_graph_output():
        return None
    for factor, other in (node.inputs, reversed(node.inputs)):
        constant = ir.convenience.get_const_tensor(factor) if factor is not None else None
        if constant is not None and constant.size == 1 and factor is not None and other is not None:
            return _Scaled(node, other, factor, constant)
    return None


def _have_root_of_scale(query: _Scaled, key: _Scaled) -> bool:
    """Return whether both are multiplied by the root of ``head_dim ** -0.5``, rounded to their dtype."""
    if not query.head_dim or query.root.dtype != key.root.dtype:
        return False
    rounded = float(np.asarray(query.head_dim**-0.25, dtype=query.root.dtype.numpy()))
    roots = [float(side.root.numpy().item()) for side in (query, key)]
    return np.allclose(roots, rounded, rtol=ROOT_TOLERANCE, atol=0)


class RemoveNanGuards(ir.passes.InPlacePass):
    """Make the masks of exported attention finite, and remove the guards against rows that are fully masked.

    A guard stays if its mask is not ``Where(mask, 0, lowest)``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace every guarded value by the softmax itself."""
        modified = False
        for node in [node for node in model.graph if node.op_type == "Where"]:
            softmax = _guarded_softmax(node)
            if softmax is not None and _has_finite_mask(model.graph, softmax):
                ir.convenience.replace_all_uses_with(node.outputs[0], softmax.outputs[0])
                modified = True
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)


def _guarded_softmax(where: ir.Node) -> ir.Node | None:
    """Return the softmax of ``Where(IsNaN(weights), 0, weights)``; None if the node is something else."""
    condition, _, weights = where.inputs
    softmax, is_nan = (value.producer() if value is not None else None for value in (weights, condition))
    if softmax is None or softmax.op_type != "Softmax" or is_nan is None or is_nan.op_type != "IsNaN":
        return None
    return softmax if is_nan.inputs[0] is weights else None


def _has_finite_mask(graph: ir.Graph, softmax: ir.Node) -> bool:
    """Return whether a softmax adds a mask of this kind, and make that mask finite, for all layers that add it."""
    scores = softmax.inputs[0]
    add = scores.producer() if scores is not None else None
    if add is None or add.op_type != "Add":
        return False
    for value in add.inputs:
        mask = value.producer() if value is not None else None
        fill = mask.inputs[2] if mask is not None and mask.op_type == "Where" else None
        constant = ir.convenience.get_const_tensor(fill) if fill is not None else None
        if mask is None or fill is None or constant is None or constant.size != 1:
            continue
        number, finite = float(constant.numpy().item()), _finite_mask_value(constant.dtype)
        if number < finite:
            mask.replace_input_with(2, _constant(graph, f"{fill.name}_finite", finite, constant))
        return number <= finite
    return False


def _finite_mask_value(dtype: ir.DataType) -> float:
    """Return half the lowest number of a dtype, rounded to it: adding scores of that size does not overflow."""
    return float(np.asarray(dtype.min / 2, dtype=dtype.numpy()))


def _constant(graph: ir.Graph, name: str, number: float, like: ir.TensorProtocol) -> ir.Value:
    if name not in graph.initializers:
        array = np.full(like.shape.numpy(), number, dtype=like.dtype.numpy())
        tensor = ir.tensor(array, like.dtype, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(like.dtype), shape=ir.Shape(array.shape))
        graph.register_initializer(value)
    return graph.initializers[name]
