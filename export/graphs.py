"""From torch modules to ONNX graphs on disk, and between graphs."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass
from torch import nn

from promprune.package import GraphRecord, TensorRecord

__all__ = ["append_graph", "graph_from_module", "graph_record", "save_graph"]

# Smaller initializers stay inside the .onnx file: shapes and constants that a graph optimizer reads.
EXTERNAL_DATA_MIN_BYTES: Final = 1024


def graph_from_module(
    module: nn.Module,
    args: tuple[Any, ...],
    *,
    inputs: Mapping[str, Mapping[int, str]],
    outputs: Mapping[str, Mapping[int, str]],
    opset: int,
    dynamic_shapes: tuple[Any, ...],
) -> ir.Model:
    """Trace a module into an ONNX graph.

    Exported in two steps (``torch.export``, then ONNX): given a module, the one-step exporter turns a dynamic
    dimension into a constant without a word; the two-step path raises.

    Args:
        module: in evaluation mode.
        args: sample inputs; every dynamic dimension at least 2.
        inputs: name of every input in order, flattened -> {axis: name of its dynamic dimension}.
        outputs: likewise of every output; a dimension that follows from others gets its own name here.
        opset: of the default domain.
        dynamic_shapes: as ``torch.export`` takes them, in the structure of ``args``.

    Returns:
        The graph, its inputs, outputs and dynamic dimensions named as asked.
    """
    with torch.no_grad(), _quiet():
        program = torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=False)
        onnx_program = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
    if onnx_program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model = onnx_program.model
    _name_dimensions(model, inputs, outputs)
    return model


def append_graph(first: ir.Model, second: ir.Model, *, connect: Mapping[str, str], prefix: str) -> ir.Model:
    """Run ``second`` after ``first``, as one graph.

    Args:
        first: changed in place; its outputs named in ``connect`` stop being outputs.
        second: emptied; its inner names get ``prefix``.
        connect: input of ``second`` -> output of ``first``; the other inputs of ``second`` become inputs of both.
        prefix: for the names of ``second``'s nodes, values and initializers, its inputs and outputs excepted.

    Returns:
        ``first``, with the remaining outputs of ``first`` and then those of ``second``.
    """
    values = {value.name: value for value in first.graph.outputs}
    outputs = list(second.graph.outputs)
    second.graph.outputs.clear()
    inputs = list(second.graph.inputs)
    second.graph.inputs.clear()
    for value in inputs:
        name = str(value.name)
        if name in connect:
            ir.convenience.replace_all_uses_with(value, values[connect[name]])
        else:
            first.graph.inputs.append(value)
    for name, value in list(second.graph.initializers.items()):
        del second.graph.initializers[name]
        value.name = prefix + name
        first.graph.register_initializer(value)
    for node in list(second.graph):
        second.graph.remove(node)
        node.name = f"{prefix}{node.name or node.op_type}"
        for value in node.outputs:
            if value not in outputs:
                value.name = f"{prefix}{value.name}"
        first.graph.append(node)
    taken = set(connect.values())
    kept = [value for value in first.graph.outputs if value.name not in taken]
    first.graph.outputs[:] = kept + outputs
    NameFixPass()(first)
    return first


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph to ``path`` with its weights beside it in ``<path>_data``, and check it."""
    model.producer_name, model.producer_version = "promprune", ""
    ir.save(model, path, external_data=f"{path.name}_data", size_threshold_bytes=EXTERNAL_DATA_MIN_BYTES)
    onnx.checker.check_model(str(path), full_check=False)


def graph_record(model: ir.Model, file: str) -> GraphRecord:
    """Describe a graph's inputs and outputs for the manifest."""
    return GraphRecord(
        file=file,
        inputs=tuple(_tensor_record(value) for value in model.graph.inputs),
        outputs=tuple(_tensor_record(value) for value in model.graph.outputs),
    )


def _tensor_record(value: ir.Value) -> TensorRecord:
    if value.name is None or value.dtype is None or value.shape is None:
        raise RuntimeError(f"graph value {value.name!r} has no dtype or shape")
    dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorRecord(name=value.name, dtype=str(value.dtype.numpy()), shape=dims)


def _name_dimensions(
    model: ir.Model, inputs: Mapping[str, Mapping[int, str]], outputs: Mapping[str, Mapping[int, str]]
) -> None:
    """Replace the exporter's names of dynamic dimensions (``s10``) by ours, wherever they stand."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in inputs[str(value.name)].items():
            names[_symbol(value, axis)] = name
    for value in _all_values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape(_rename(dim, names) for dim in value.shape)
    for value in model.graph.outputs:
        for axis, name in outputs[str(value.name)].items():
            _symbol(value, axis)
            value.shape = ir.Shape(name if i == axis else dim for i, dim in enumerate(value.shape or ()))


def _symbol(value: ir.Value, axis: int) -> str:
    dim = value.shape[axis] if value.shape is not None else None
    if not isinstance(dim, ir.SymbolicDim):
        raise RuntimeError(f"dimension {axis} of {value.name!r} became the constant {dim}")
    return str(dim.value)


def _rename(dim: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str:
    if isinstance(dim, int):
        return dim
    return re.sub(r"\w+", lambda match: names.get(match[0], match[0]), str(dim.value))


def _all_values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes on its own internals from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
