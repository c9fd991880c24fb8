"""Matching the attention of a decoder layer as the exporter writes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import onnx_ir as ir

from promprune.errors import UnsupportedModelError

__all__ = ["Attention", "Rotary", "find_attention", "match_rotary", "merged_heads", "producer_of", "single_constant"]

_HEADS_SECOND: Final = (0, 2, 1, 3)  # [B, S, heads, D] <-> [B, heads, S, D]
# Comparisons of a causal mask; the only other one is Greater(key position, query position - window).
_CAUSAL: Final = "LessOrEqual"
_COMPARISONS: Final = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "Not", "Or", "Xor"})


class Attention(NamedTuple):
    """The attention of one layer. B: batch, S: new positions, D: size of a head.

    Attributes:
        query: [B, heads, S, D], before it is scaled.
        key, value: [B, kv heads, S, D], of the new positions.
        scale: factor of the scores.
        window: number of positions that a query attends to, including its own; None for all.
        merge: the node that returns [B, S, heads * D].
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    scale: float
    window: int | None
    merge: ir.Node


class Rotary(NamedTuple):
    """Rotated queries or keys.

    Attributes:
        value: [B, heads, S, D], before the rotation.
        cos, sin: [B, S, D], both halves equal, or [B, S, D / 2].
    """

    value: ir.Value
    cos: ir.Value
    sin: ir.Value


def find_attention(past: tuple[ir.Value, ir.Value], present: tuple[ir.Value, ir.Value]) -> Attention:
    """Find the attention of the layer with this KV cache.

    Args:
        past: graph inputs, key and value.
        present: graph outputs, key and value.

    Raises:
        UnsupportedModelError: the graph has another form.
    """
    key, value = (_appended(old, new) for old, new in zip(past, present, strict=True))
    core = _consumer(present[1], {"MatMul", "Attention"})
    if core.op_type == "Attention":
        query, mask, scale = _fused_inputs(core)
    else:
        query, mask, scale = _plain_inputs(core)
    merge = _consumer(core.outputs[0], {"Reshape"}, through={"Transpose"})
    return Attention(query, key, value, scale, _window_of(mask), merge)


def match_rotary(value: ir.Value) -> Rotary | None:
    """Match a rotation by halves, as in transformers and ONNX; return None if there is none, or another kind."""
    node = producer_of(value)
    if node is not None and node.op_type == "RotaryEmbedding":
        plain = not node.attributes.get_int("interleaved", 0) and not node.attributes.get_int("rotary_embedding_dim", 0)
        inputs = [source for source in node.inputs if source is not None]
        return Rotary(*inputs) if plain and len(inputs) == 3 else None
    products = [producer_of(side) for side in node.inputs] if node is not None and node.op_type == "Add" else []
    for straight, turned in (products, products[::-1]) if len(products) == 2 else ():
        if straight is None or turned is None or {straight.op_type, turned.op_type} != {"Mul"}:
            continue
        source, cos = straight.inputs
        halves, sin = turned.inputs
        rotary = [source, _unsqueezed(cos), _unsqueezed(sin)]
        if _turns_halves(halves, source) and all(part is not None for part in rotary):
            return Rotary(*[part for part in rotary if part is not None])
    return None


def merged_heads(value: ir.Value) -> ir.Value | None:
    """Return the value [B, S, heads * D] that was split into ``value`` [B, heads, S, D]; None if there is none."""
    transpose = producer_of(value)
    if transpose is None or transpose.op_type != "Transpose" or not _swaps_heads(transpose):
        return None
    reshape, shape = producer_of(transpose.inputs[0]), value.shape
    source = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    if source is None or source.shape is None or len(source.shape) != 3 or shape is None:
        return None
    heads, size, width = shape[1], shape[3], source.shape[2]
    known = isinstance(heads, int) and isinstance(size, int) and isinstance(width, int)
    return source if known and heads * size == width else None


def producer_of(value: ir.Value | None) -> ir.Node | None:
    """Return the node that computes a value; None for inputs, constants and None."""
    return None if value is None else value.producer()


def single_constant(value: ir.Value | None) -> float | None:
    """Return the number in a constant; None if the value is computed, or has several numbers."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def _appended(past: ir.Value, present: ir.Value) -> ir.Value:
    node = producer_of(present)
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or node.inputs[0] is not past:
        raise _other_form(present, "Concat(past, new)")
    new = node.inputs[1]
    if new is None or node.attributes["axis"].as_int() not in (-2, 2):
        raise _other_form(present, "Concat(past, new) along the positions")
    return new


def _consumer(
    value: ir.Value, kinds: set[str], through: frozenset[str] | set[str] = frozenset({"Unsqueeze", "Expand", "Reshape"})
) -> ir.Node:
    """Return the only node of some kinds that uses a value, directly or after nodes that repeat or reorder it."""
    found = []
    for node in value.consumers():
        if node.op_type in kinds:
            found.append(node)
        elif node.op_type in through:
            found.append(_consumer(node.outputs[0], kinds, through))
    if len(set(found)) != 1:
        raise _other_form(value, f"one {' or '.join(sorted(kinds))} that reads it")
    return found[0]


def _fused_inputs(node: ir.Node) -> tuple[ir.Value, ir.Value, float]:
    """Return query, mask and scale of an ONNX Attention."""
    query, mask = node.inputs[0], node.inputs[3] if len(node.inputs) > 3 else None
    attributes = node.attributes
    size = query.shape[3] if query is not None and query.shape is not None else None
    scale = attributes.get_float("scale", size**-0.5 if isinstance(size, int) else None)
    plain = not attributes.get_float("softcap", 0.0) and not attributes.get_int("is_causal", 0)
    if query is None or mask is None or scale is None or not plain or len(node.inputs) > 4:
        raise _other_form(node.outputs[0], "Attention(query, key, value, mask) without softcap")
    return query, mask, scale


def _plain_inputs(node: ir.Node) -> tuple[ir.Value, ir.Value, float]:
    """Return query, mask and scale of ``MatMul(Softmax(MatMul(query * scale, keys) + mask), values)``.

    If the scale is not the usual one, as in Granite, its root is on both sides.
    """
    softmax = producer_of(node.inputs[0])
    add = producer_of(softmax.inputs[0]) if softmax is not None and softmax.op_type == "Softmax" else None
    scores = producer_of(add.inputs[0]) if add is not None and add.op_type == "Add" else None
    scaled = producer_of(scores.inputs[0]) if scores is not None and scores.op_type == "MatMul" else None
    mask = add.inputs[1] if add is not None else None
    if scaled is None or scaled.op_type != "Mul" or mask is None:
        raise _other_form(node.outputs[0], "MatMul(Softmax(MatMul(query * scale, keys) + mask), values)")
    query, scale = scaled.inputs[0], single_constant(scaled.inputs[1])
    if query is None or scale is None or scores is None:
        raise _other_form(node.outputs[0], "queries scaled by a number")
    keys = producer_of(scores.inputs[1])
    if keys is None or keys.op_type != "Mul":
        return query, mask, scale
    root = single_constant(keys.inputs[1])
    if root is None:
        raise _other_form(node.outputs[0], "keys scaled by a number")
    return query, mask, scale * root


def _window_of(mask: ir.Value) -> int | None:
    """Return the sliding window of a causal mask; None if it has none.

    Raises:
        UnsupportedModelError: it may mask other positions than a causal mask.
    """
    comparisons = [node for node in _ancestors(mask) if node.op_type in _COMPARISONS | {_CAUSAL}]
    windows = [node for node in comparisons if node.op_type == "Greater"]
    others = [node.op_type for node in comparisons if node.op_type not in ("Greater", _CAUSAL)]
    if others or len(windows) > 1 or len(comparisons) - len(windows) != 1:
        raise UnsupportedModelError(
            f"the mask {mask.name} has the comparisons {', '.join(sorted(node.op_type for node in comparisons))}",
            expected="a causal mask, with or without a sliding window",
        )
    if not windows:
        return None
    begin = producer_of(windows[0].inputs[1])
    window = single_constant(begin.inputs[1]) if begin is not None and begin.op_type == "Sub" else None
    if window is None:
        raise _other_form(mask, "Greater(key position, query position - window)")
    return int(window)


def _ancestors(value: ir.Value) -> Iterator[ir.Node]:
    """Yield every node that a value depends on, once."""
    seen: set[ir.Node] = set()
    open_nodes = [producer_of(value)]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            open_nodes += [producer_of(source) for source in node.inputs]


def _turns_halves(value: ir.Value | None, source: ir.Value | None) -> bool:
    """Return whether ``value`` is ``Concat(-source[half:], source[:half])`` along the last axis."""
    concat = producer_of(value)
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 2 or source is None:
        return False
    negated, first = (producer_of(part) for part in concat.inputs)
    second = producer_of(negated.inputs[0]) if negated is not None and negated.op_type == "Neg" else None
    size = source.shape[3] if source.shape is not None and len(source.shape) == 4 else None
    if first is None or second is None or {first.op_type, second.op_type} != {"Slice"} or not isinstance(size, int):
        return False
    starts = [single_constant(part.inputs[1]) for part in (first, second)]
    ends = single_constant(first.inputs[2])
    return first.inputs[0] is source is second.inputs[0] and starts == [0, size // 2] and ends == size // 2


def _unsqueezed(value: ir.Value | None) -> ir.Value | None:
    """Return the [B, S, D] of a [B, 1, S, D]."""
    node = producer_of(value)
    return node.inputs[0] if node is not None and node.op_type == "Unsqueeze" else None


def _swaps_heads(transpose: ir.Node) -> bool:
    return tuple(transpose.attributes["perm"].as_ints()) == _HEADS_SECOND


def _other_form(value: ir.Value, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the decoder computes {value.name} in an unsupported way", expected=expected)
