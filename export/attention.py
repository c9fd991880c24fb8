"""The attention that the exporter writes, made as cheap as the attention that the model computes.

A masked ``scaled_dot_product_attention`` is exported with a mask of the lowest number there is, and with a guard behind
the softmax that turns the NaN of a fully masked row into zero::

    Softmax(scores + Where(mask, 0, lowest)) -> Where(IsNaN(weights), 0, weights)

Only rows of padding are fully masked, and nobody reads them. Half that number cannot overflow: such rows get finite
weights, every other row has the same weights as before (``exp`` of the mask is zero), and the guard is not needed: two
passes over ``[B, heads, S, P + S]`` in every layer, which also keep engines from fusing the attention.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["drop_nan_guards"]


def drop_nan_guards(model: ir.Model) -> None:
    """Make the masks of exported attention finite, and remove the guards against rows that are fully masked.

    A guard whose mask is anything but ``Where(mask, 0, lowest)`` stays.
    """
    for node in list(model.graph):
        if node.op_type != "Where" or (weights := node.inputs[2]) is None:
            continue
        softmax, is_nan = weights.producer(), node.inputs[0].producer() if node.inputs[0] is not None else None
        if softmax is None or softmax.op_type != "Softmax" or is_nan is None or is_nan.op_type != "IsNaN":
            continue
        if is_nan.inputs[0] is weights and _has_finite_mask(model.graph, softmax):
            ir.convenience.replace_all_uses_with(node.outputs[0], weights)
    RemoveUnusedNodesPass()(model)


def _has_finite_mask(graph: ir.Graph, softmax: ir.Node) -> bool:
    """Say whether a softmax adds a mask of this kind; it is finite afterwards, for every layer that adds it."""
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
        number, finite = float(constant.numpy().item()), _masking(constant.dtype)
        if number < finite:
            mask.replace_input_with(2, _constant(graph, f"{fill.name}_finite", finite, constant))
        return number <= finite
    return False


def _masking(dtype: ir.DataType) -> float:
    """Return about half the lowest number of a type, exact in it: scores as large may still be added."""
    return float(np.asarray(dtype.min / 2, dtype=dtype.numpy()))


def _constant(graph: ir.Graph, name: str, number: float, like: ir.TensorProtocol) -> ir.Value:
    if name not in graph.initializers:
        array = np.full(like.shape.numpy(), number, dtype=like.dtype.numpy())
        tensor = ir.tensor(array, like.dtype, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(like.dtype), shape=ir.Shape(array.shape))
        graph.register_initializer(value)
    return graph.initializers[name]
