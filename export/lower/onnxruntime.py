"""Lowering the decoder for ONNX Runtime: fused attention, with keys and values in a buffer that is updated in place.

The portable graph returns past and new keys and values as new tensors, so every step copies the entire KV cache, and it
pads the rows of a batch to one length. Here each layer's attention is one ``com.microsoft.GroupQueryAttention``:

==========================  ==================================================================================
``inputs_embeds``           [B, S, D], as in the portable graph
``position_ids``            [B, S] or [3, B, S], as in the portable graph
``seqlens_k``               int32 [B], positions of each row after this run, minus 1
``total_sequence_length``   int32 [1], the largest number of positions of any row after this run
``past_key_values.N.*``     [B, kv heads, capacity, head dim]; the same buffer as ``present.N.*``
``logits``                  [B, 1, vocabulary], of the last new position
==========================  ==================================================================================

A run either starts every row (S == ``total_sequence_length``), appends S positions to one row (B == 1), or appends one
position to every row (S == 1). The operator writes new keys and values after the past ones of each row, and reads only
up to ``seqlens_k``: rows need no padding, and a smaller ``seqlens_k`` truncates a row. Rotary embeddings are applied
before it, with the positions of the portable graph, because the operator does not support multimodal positions.

The weights are those in the files of the portable graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxscript.rewriter import onnx_fusions

from promprune.errors import UnsupportedModelError
from promprune.export.lower.patterns import Attention, Rotary, find_attention, match_rotary, merged_heads
from promprune.package.lowered import SEQLENS, TOTAL_LENGTH

__all__ = ["lower_decoder"]

_CONTRIB: Final = "com.microsoft"
_MASK: Final = "attention_mask"
_FUSION_OPSET: Final = 23  # the first with RMSNormalization
_HEAD_MULTIPLE: Final = 8
_DTYPES: Final = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})  # dtypes with kernels for the CPU and CUDA


def lower_decoder(model: ir.Model) -> None:
    """Rewrite the portable decoder, in place, into the graph described above.

    Args:
        model: a graph made by :func:`promprune.export.graphs.decoder.decoder_graph`.

    Raises:
        UnsupportedModelError: ONNX Runtime's operator does not support this decoder; the message says why.
    """
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    outputs = {str(value.name): value for value in graph.outputs}
    pairs = [(name, f"present.{name.partition('.')[2]}") for name in inputs if name.startswith("past_key_values.")]
    layers = [
        tuple((inputs[past], outputs[present]) for past, present in pairs[index : index + 2])
        for index in range(0, len(pairs), 2)
    ]
    _check_dtype(inputs["inputs_embeds"])
    attentions = [find_attention(*zip(*layer, strict=True)) for layer in layers]
    lowering = _Lowering(model)
    for (key, value), attention in zip(layers, attentions, strict=True):
        lowering.replace(attention, (key[0], value[0]), (key[1], value[1]))
    _fuse_norms(model)
    _remove_mask(graph)
    model.opset_imports[_CONTRIB] = 1
    _check_past(graph)


class _Lowering:
    """Inserts the fused operators into one graph; inputs that all layers share are inserted once."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        shape = model.graph.inputs[0].shape
        self._batch = shape[0] if shape is not None else None
        self._lengths = [
            ir.Value(name=SEQLENS, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([self._batch])),
            ir.Value(name=TOTAL_LENGTH, type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([1])),
        ]
        model.graph.inputs.extend(self._lengths)
        self._rotary_rows: ir.Value | None = None
        self._tables: dict[ir.Value, ir.Value] = {}

    def replace(
        self, attention: Attention, past: tuple[ir.Value, ir.Value], present: tuple[ir.Value, ir.Value]
    ) -> None:
        """Replace one layer's attention, and the outputs ``present`` by buffers that are updated in place."""
        merge = attention.merge
        heads, kv_heads = _fixed(attention.query, 1), _fixed(attention.key, 1)
        if _fixed(attention.key, 3) % _HEAD_MULTIPLE:
            raise UnsupportedModelError(
                f"the decoder has a head size of {_fixed(attention.key, 3)}",
                expected=f"a multiple of {_HEAD_MULTIPLE}",
            )
        inputs = [self._merged(value, merge) for value in (attention.query, attention.key, attention.value)]
        window = {} if attention.window is None else {"local_window_size": attention.window}
        fused = ir.node(
            "GroupQueryAttention",
            [*inputs, *past, *self._lengths],
            {"num_heads": heads, "kv_num_heads": kv_heads, "scale": attention.scale, **window},
            domain=_CONTRIB,
            num_outputs=3,
        )
        self._graph.insert_before(merge, fused)
        whole, merged, buffers = merge.outputs[0], fused.outputs[0], fused.outputs[1:]
        merged.name, merged.type, merged.shape = f"{whole.name}_fused", whole.type, whole.shape
        ir.convenience.replace_all_uses_with(whole, merged)
        for old, new, source in zip(present, buffers, past, strict=True):
            source.shape = ir.Shape([self._batch, kv_heads, "capacity", _fixed(source, 3)])
            new.name, new.type, new.shape = old.name, old.type, source.shape
            old.name = f"{old.name}_portable"
            self._graph.outputs[self._graph.outputs.index(old)] = new

    def _merged(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """Return queries, keys or values [B, heads, S, D] as [B, S, heads * D], with rotation if they have one."""
        rotary = match_rotary(value)
        if rotary is not None:
            return self._rotated(rotary, before)
        source = merged_heads(value)
        if source is not None:
            return source
        swapped = self._insert(before, "Transpose", [value], {"perm": [0, 2, 1, 3]})
        shape = self._constant([0, 0, _fixed(value, 1) * _fixed(value, 3)])
        return self._insert(before, "Reshape", [swapped, shape])

    def _rotated(self, rotary: Rotary, before: ir.Node) -> ir.Value:
        half = _fixed(rotary.value, 3) // 2
        tables = [self._table(value, half) for value in (rotary.cos, rotary.sin)]
        inputs = [self._merged(rotary.value, before), self._rows(), *tables]
        return self._insert(before, "RotaryEmbedding", inputs, {"num_heads": _fixed(rotary.value, 1)}, domain=_CONTRIB)

    def _table(self, value: ir.Value, half: int) -> ir.Value:
        """Return a cosine or sine [B, S, D or D / 2] as a table [B * S, D / 2]: one row per new position."""
        if value not in self._tables:
            after = value.producer()
            if after is None:
                raise UnsupportedModelError(f"the rotation by {value.name} is not computed in the graph")
            edges = [self._constant([edge]) for edge in (0, half, -1)]
            sliced = ir.node("Slice", [value, *edges])
            table = ir.node("Reshape", [sliced.outputs[0], self._constant([-1, half])])
            self._graph.insert_after(after, [sliced, table])
            self._tables[value] = table.outputs[0]
        return self._tables[value]

    def _rows(self) -> ir.Value:
        """Return the row index of each new position in these tables: 0, 1, ... as int64 [B, S]."""
        if self._rotary_rows is None:
            positions = next(value for value in self._graph.inputs if value.name == "position_ids")
            shape = ir.node("Shape", [positions], {"start": -2})
            count = ir.node("ReduceProd", [shape.outputs[0]], {"keepdims": 0})
            scalars = [self._constant(number) for number in (0, 1)]
            numbers = ir.node("Range", [scalars[0], count.outputs[0], scalars[1]])
            rows = ir.node("Reshape", [numbers.outputs[0], shape.outputs[0]])
            self._graph.insert_before(self._graph[0], [shape, count, numbers, rows])
            self._rotary_rows = rows.outputs[0]
        return self._rotary_rows

    def _insert(
        self,
        before: ir.Node,
        kind: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        node = ir.node(kind, inputs, attributes, domain=domain)
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _constant(self, content: int | list[int]) -> ir.Value:
        name = f"lowered_{content}".replace(" ", "")
        if name not in self._graph.initializers:
            array = np.array(content, np.int64)
            tensor, shape = ir.tensor(array, name=name), ir.Shape(array.shape)
            value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=shape)
            self._graph.register_initializer(value)
        return self._graph.initializers[name]


def _check_dtype(value: ir.Value) -> None:
    if value.dtype not in _DTYPES:
        raise UnsupportedModelError(f"the decoder computes in {value.dtype}", expected="fp32 or fp16")


def _fuse_norms(model: ir.Model) -> None:
    """Replace every RMS norm by one operator, which ONNX Runtime can also fuse with the residual sum."""
    opset = model.opset_imports[""]
    model.opset_imports[""] = max(opset or 0, _FUSION_OPSET)
    onnx_fusions.fuse(model)
    model.opset_imports[""] = opset or _FUSION_OPSET
    for node in list(model.graph):
        if node.op_type == "RMSNormalization":
            node.op_type = "SimplifiedLayerNormalization"
            _fuse_residual(model.graph, node)
    passes.RemoveUnusedNodesPass()(model)


def _fuse_residual(graph: ir.Graph, norm: ir.Node) -> None:
    """Fuse a norm with the sum of two hidden states that is its input; the sum remains an output."""
    add = norm.inputs[0].producer() if norm.inputs[0] is not None else None
    if add is None or add.op_type != "Add" or any(value is None or value.is_initializer() for value in add.inputs):
        return
    epsilon = norm.attributes.get_float("epsilon")
    inputs = [*add.inputs, norm.inputs[1]]
    fused = ir.node("SkipSimplifiedLayerNormalization", inputs, {"epsilon": epsilon}, domain=_CONTRIB, num_outputs=4)
    graph.insert_after(add, fused)
    for old, new in ((norm.outputs[0], fused.outputs[0]), (add.outputs[0], fused.outputs[3])):
        new.name, new.type, new.shape = f"{old.name}_fused", old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new)


def _remove_mask(graph: ir.Graph) -> None:
    mask = next(value for value in graph.inputs if value.name == _MASK)
    if mask.uses():
        raise UnsupportedModelError("the attention mask is used outside of the attention", expected="no other use")
    graph.inputs.remove(mask)


def _check_past(graph: ir.Graph) -> None:
    """Refuse a graph that also uses keys and values, or their length, elsewhere: the buffers are longer."""
    for node in graph:
        past = [value for value in node.inputs if value is not None and str(value.name).startswith("past_key_values.")]
        if past and node.op_type != "GroupQueryAttention" and not _reads_batch(node):
            raise UnsupportedModelError(
                f"{node.op_type} {node.name} reads {past[0].name}", expected="keys and values in attention only"
            )


def _reads_batch(node: ir.Node) -> bool:
    attributes = node.attributes
    return node.op_type == "Shape" and attributes.get_int("start", 0) == 0 and attributes.get_int("end", 4) == 1


def _fixed(value: ir.Value, axis: int) -> int:
    size = value.shape[axis] if value.shape is not None else None
    if not isinstance(size, int):
        raise UnsupportedModelError(f"axis {axis} of {value.name} is dynamic", expected="a constant size")
    return size
