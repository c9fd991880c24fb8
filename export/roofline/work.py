"""Counting the work of an ONNX graph from its shapes: FLOPs, and the bytes that have to be moved at least.

A multiply-add of MatMul, Gemm, Conv, Einsum or Attention counts as two FLOPs, as in PyTorch's ``FlopCounterMode``.
Sums, activations, norms and softmax are not counted: they are less than a hundredth of a transformer's work.
"""

from __future__ import annotations

import ast
import math
import operator
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import onnx
from onnx import helper, shape_inference

from promprune.errors import PackageError
from promprune.package.manifest import DECODER, EMBED_TOKENS, Manifest
from promprune.runtime.bench.report import GraphWork

__all__ = ["count_work", "cut_selection", "load_graph", "package_work", "write_parts"]

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_STANDARD: Final = ("", "ai.onnx")  # the domains of standard operators
SELECTOR_PREFIX: Final = "selector/"  # prefix of the names of the selection's nodes in a vision graph


def load_graph(path: Path) -> onnx.ModelProto:
    """Read a graph without its weights."""
    return onnx.load(str(path), load_external_data=False)


def count_work(model: onnx.ModelProto, dimensions: Mapping[str, int], *, loop_trips: int = 1) -> GraphWork:
    """Count one run of a graph.

    Args:
        model: the graph, with or without its weights; not changed.
        dimensions: size of every dynamic dimension of the graph's inputs, by name.
        loop_trips: number of iterations of each Loop or Scan.

    Raises:
        PackageError: a counted operator has an input of unknown shape.
    """
    whole = _with_sizes(model, dimensions)
    edges = (*whole.graph.input, *whole.graph.output)
    foreign = {node.op_type for node in _all_nodes(whole.graph) if node.domain not in _STANDARD}
    return GraphWork(
        flops=_flops(whole, loop_trips),
        traffic_bytes=sum(map(_bytes_of, edges)) + _weight_bytes(whole.graph),
        uncounted=tuple(sorted(foreign)),
    )


def cut_selection(model: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto | None]:
    """Divide a vision graph into the encoder and the selection after it.

    Returns:
        The encoder, whose outputs are the inputs of the selection, and the selection, or None if there is none.
    """
    inferred = shape_inference.infer_shapes(model, data_prop=True)
    graph = inferred.graph
    behind = [node for node in graph.node if node.name.startswith(SELECTOR_PREFIX)]
    if not behind:
        return model, None
    before = [node for node in graph.node if not node.name.startswith(SELECTOR_PREFIX)]
    made = {name for node in before for name in node.output} | {value.name for value in graph.input}
    crossing = sorted({name for node in behind for name in _names_read(node)} & made)
    known = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    border = [known[name] for name in crossing]
    own = {name for node in behind for name in node.output}
    encoder = _subgraph(inferred, before, list(graph.input), border)
    return encoder, _subgraph(inferred, behind, border, [value for value in graph.output if value.name in own])


def _subgraph(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    read = {name for node in nodes for name in _names_read(node)}
    made = {name for node in nodes for name in node.output}
    graph = helper.make_graph(
        nodes,
        model.graph.name,
        inputs,
        outputs,
        [tensor for tensor in model.graph.initializer if tensor.name in read],
        value_info=[value for value in model.graph.value_info if value.name in made],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def _names_read(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the inputs of a node, and those of all nodes in its subgraphs."""
    yield from node.input
    for inner in _inner_graphs(node):
        for inside in inner.node:
            yield from _names_read(inside)


def _inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in _inner_graphs(node):
            yield from _all_nodes(inner)


def _with_sizes(model: onnx.ModelProto, dimensions: Mapping[str, int]) -> onnx.ModelProto:
    """Return the graph with numbers for its dynamic dimensions, after shape inference."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    for value in (*whole.graph.input, *whole.graph.output, *whole.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            size = _evaluate(dim.dim_param, dimensions) if dim.HasField("dim_param") else None
            if size is not None:
                dim.dim_value = size
            elif not dim.HasField("dim_value"):
                dim.ClearField("dim_param")
    return shape_inference.infer_shapes(whole, data_prop=True)


_OPERATORS: Final[Mapping[type, Callable[[int, int], int]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def _evaluate(expression: str, dimensions: Mapping[str, int]) -> int | None:
    """Compute a dimension such as ``past_sequence_length + sequence_length``; None if a name is not known."""
    try:
        return _value(ast.parse(expression, mode="eval").body, dimensions)
    except (SyntaxError, KeyError):
        return None


def _value(node: ast.expr, dimensions: Mapping[str, int]) -> int:
    match node:
        case ast.Name(id=name):
            return dimensions[name]
        case ast.Constant(value=int() as number):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, dimensions), _value(right, dimensions))
    raise KeyError(ast.dump(node))


def _shapes(graph: onnx.GraphProto) -> dict[str, Shape]:
    """Return all shapes of a graph that have only numbers."""
    shapes = {name: shape for name, shape in map(_known_shape, _values(graph)) if shape is not None}
    shapes.update((tensor.name, tuple(tensor.dims)) for tensor in graph.initializer)
    return shapes


def _values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    yield from (*graph.input, *graph.output, *graph.value_info)


def _known_shape(value: onnx.ValueInfoProto) -> tuple[str, Shape | None]:
    tensor = value.type.tensor_type
    known = tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim)
    return value.name, tuple(dim.dim_value for dim in tensor.shape.dim) if known else None


def _flops(model: onnx.ModelProto, loop_trips: int) -> int:
    shapes, total = _shapes(model.graph), 0
    for node in model.graph.node:
        if node.op_type in _COUNTED and node.domain in _STANDARD:
            total += _COUNTED[node.op_type](node, shapes)
        trips = loop_trips if node.op_type in ("Loop", "Scan") else 1
        total += trips * sum(_flops(_as_model(inner, node, model), loop_trips) for inner in _inner_graphs(node))
    return total


def _as_model(inner: onnx.GraphProto, node: onnx.NodeProto, outer: onnx.ModelProto) -> onnx.ModelProto:
    """Return the body of a Loop or If as a separate graph, with the shapes of its outer values.

    The values that a Loop carries from one iteration to the next keep their shapes.
    """
    body = onnx.GraphProto()
    body.CopyFrom(inner)
    known = {value.name: value for value in _values(outer.graph)}
    if node.op_type == "Loop":
        for value, name in zip(body.input, node.input, strict=False):
            if name in known:
                value.type.CopyFrom(known[name].type)
    own = {value.name for value in body.input} | {name for inside in body.node for name in inside.output}
    captured = {name for inside in body.node for name in _names_read(inside)} - own
    body.input.extend(known[name] for name in sorted(captured & known.keys()))
    body.initializer.extend(tensor for tensor in outer.graph.initializer if tensor.name in captured)
    model = helper.make_model(body, opset_imports=outer.opset_import, ir_version=outer.ir_version)
    return shape_inference.infer_shapes(model, data_prop=True)


def _shape(name: str, node: onnx.NodeProto, shapes: Shapes) -> Shape:
    if name not in shapes:
        raise PackageError(
            f"the shape of {name!r}, of the {node.op_type} {node.name!r}, is not known, so its work cannot be counted",
            fix="export the package again",
        )
    return shapes[name]


def _matmul(node: onnx.NodeProto, shapes: Shapes) -> int:
    a, b = _shape(node.input[0], node, shapes), _shape(node.input[1], node, shapes)
    rows, columns = (a[-2] if len(a) > 1 else 1), (b[-1] if len(b) > 1 else 1)
    return 2 * math.prod(_broadcast(a[:-2], b[:-2])) * rows * a[-1] * columns


def _broadcast(a: Shape, b: Shape) -> Shape:
    length = max(len(a), len(b))
    pairs = zip((1,) * (length - len(a)) + a, (1,) * (length - len(b)) + b, strict=True)
    return tuple(y if x == 1 else x for x, y in pairs)


def _gemm(node: onnx.NodeProto, shapes: Shapes) -> int:
    a, b = _shape(node.input[0], node, shapes), _shape(node.input[1], node, shapes)
    rows, inner = a[::-1] if _attribute(node, "transA", 0) else a
    return 2 * rows * inner * (b[0] if _attribute(node, "transB", 0) else b[1])


def _conv(node: onnx.NodeProto, shapes: Shapes) -> int:
    kernel = _shape(node.input[1], node, shapes)  # [out channels, in channels / groups, *window]
    return 2 * math.prod(_shape(node.output[0], node, shapes)) * math.prod(kernel[1:])


def _einsum(node: onnx.NodeProto, shapes: Shapes) -> int:
    terms = str(_attribute(node, "equation", b"").decode()).replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, name in zip(terms, node.input, strict=True):
        sizes.update(zip(term, _shape(name, node, shapes), strict=True))
    return 2 * max(len(terms) - 1, 0) * math.prod(sizes.values())


def _attention(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Count both products of ``Attention`` (opset 23), including masked positions, as for unfused attention."""
    query, key, value = (_shape(name, node, shapes) for name in node.input[:3])
    past = _shape(node.input[4], node, shapes)[2] if len(node.input) > 4 and node.input[4] else 0
    if len(query) == 3:  # [batch, length, heads x size]
        groups = int(_attribute(node, "q_num_heads", 1)) // int(_attribute(node, "kv_num_heads", 1))
        return 2 * query[0] * query[1] * (past + key[1]) * (query[2] + groups * value[2])
    return 2 * math.prod(query[:3]) * (past + key[2]) * (query[3] + value[3])


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    found = (helper.get_attribute_value(attribute) for attribute in node.attribute if attribute.name == name)
    return next(found, default)


_COUNTED: Final[Mapping[str, Callable[[onnx.NodeProto, Shapes], int]]] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Einsum": _einsum,
    "Attention": _attention,
}


def _weight_bytes(graph: onnx.GraphProto) -> int:
    """Return the bytes of all weights; of a table that is only used by Gather, only the gathered rows count."""
    shapes, weights = _shapes(graph), {tensor.name: tensor for tensor in graph.initializer}
    whole: set[str] = set()
    rows = 0
    for node in _all_nodes(graph):
        table = weights.get(node.input[0]) if node.op_type == "Gather" and node.input else None
        if table is not None and node.output[0] in shapes:
            rows += math.prod(shapes[node.output[0]]) * _item_bytes(table.data_type)
            whole.update(node.input[1:])
        else:
            whole.update(node.input)
    return rows + sum(_tensor_bytes(weights[name]) for name in whole & weights.keys())


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims) * _item_bytes(tensor.data_type)


def _bytes_of(value: onnx.ValueInfoProto) -> int:
    _, shape = _known_shape(value)
    if shape is None:
        raise PackageError(
            f"the shape of {value.name!r} is not known, so its bytes cannot be counted", fix="export the package again"
        )
    return math.prod(shape) * _item_bytes(value.type.tensor_type.elem_type)


def _item_bytes(data_type: int) -> int:
    return int(helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def package_work(
    folder: Path, manifest: Manifest, vision_graph: str, sizes: Mapping[str, int], prompt_tokens: int
) -> dict[str, GraphWork]:
    """Count the work of each stage for one image and a prompt.

    ``decode`` is the first decode step. A Loop in the selection counts with the largest possible number of iterations:
    one per kept token.

    Args:
        folder: the package.
        manifest: its manifest.
        vision_graph: name of the vision graph of the image.
        sizes: dynamic dimension of that graph -> its size for this image.
        prompt_tokens: length of the prompt, including visual tokens.

    Raises:
        PackageError: a shape in a graph is not known.
    """
    graphs = {name: load_graph(folder / record.file) for name, record in manifest.graphs.items()}
    encoder, selection = cut_selection(graphs[vision_graph])
    work = {"vision": count_work(encoder, sizes)}
    if selection is not None:
        work["selection"] = count_work(selection, sizes, loop_trips=manifest.tokens_of(vision_graph).keep_tokens)
    work["splice"] = count_work(graphs[EMBED_TOKENS], {"batch_size": 1, "sequence_length": prompt_tokens})
    work["prefill"] = count_work(graphs[DECODER], _lengths(prompt_tokens, 0))
    work["decode"] = count_work(graphs[DECODER], _lengths(1, prompt_tokens))
    return work


def _lengths(new: int, past: int) -> dict[str, int]:
    return {"batch_size": 1, "sequence_length": new, "past_sequence_length": past, "total_sequence_length": past + new}


def write_parts(path: Path, folder: Path) -> tuple[Path, Path] | None:
    """Write the encoder and the selection of a vision graph as two graphs into a folder, with their weights.

    Returns:
        Both files; None if the graph has no selection.
    """
    encoder, selection = cut_selection(load_graph(path))
    if selection is None:
        return None
    return _save_part(encoder, "encoder", path, folder), _save_part(selection, "selection", path, folder)


def _save_part(model: onnx.ModelProto, name: str, source: Path, folder: Path) -> Path:
    """Write a part of a graph, with all weights of the graph in the same folder."""
    path = folder / f"{name}.onnx"
    onnx.save(model, str(path))
    weights = {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location" and not (folder / entry.value).exists()
    }
    for location in weights:
        try:
            os.link(source.parent / location, folder / location)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source.parent / location, folder / location)
    return path
