"""Tracing torch modules into ONNX graphs, and writing the graphs to disk."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewritePass, onnx_fusions
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from promprune.export.checkpoint.meta_model import fake_mode_of
from promprune.export.checkpoint.weights import CheckpointTensor, initializer, linked, tensor_at
from promprune.export.graphs.external_data import ExternalData
from promprune.export.graphs.passes.attention import RemoveNanGuards, ScaleQueriesOnly
from promprune.export.graphs.passes.layers import RepeatLayer, Repetition
from promprune.package.manifest import GraphRecord, TensorRecord, TokenCounts

__all__ = ["graph_from_module", "save_graph", "tensor_record"]

# All rules of torch.onnx but one, which compares every pair of nodes and takes most of the time in a deep graph.
_RULES: Final = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name != "SlicesSplit"]


def graph_from_module(
    module: nn.Module,
    args: tuple[Any, ...],
    *,
    inputs: Mapping[str, Mapping[int, str]],
    outputs: Mapping[str, Mapping[int, str]],
    opset: int,
    dynamic_shapes: tuple[Any, ...],
    repetition: Repetition | None = None,
) -> ir.Model:
    """Trace a module into an ONNX graph.

    The module is exported in two steps (``torch.export``, then ONNX), because the one-step exporter may silently turn
    a dynamic dimension into a constant; the two-step path raises.

    Args:
        module: the module, in evaluation mode.
        args: sample inputs; every dynamic dimension at least 2.
        inputs: name of every input in order, flattened -> {axis: name of its dynamic dimension}.
        outputs: the same for every output; a dimension that follows from others gets its own name here.
        opset: operator set of the default domain.
        dynamic_shapes: the argument of ``torch.export``, in the structure of ``args``.
        repetition: layers that ``module`` lacks; ``inputs`` and ``outputs`` include theirs.

    Returns:
        The graph; its inputs, outputs and dynamic dimensions have the given names.
    """
    mode = fake_mode_of(module)
    with torch.no_grad(), _quiet(), mode or contextlib.nullcontext():
        if mode is not None:
            args = tree_map_only(Tensor, mode.from_tensor, args)
        program = torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=False)
        onnx_program = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=opset,
            input_names=_without_repeated_layers(inputs, repetition),
            output_names=_without_repeated_layers(outputs, repetition),
            optimize=False,
            verbose=False,
        )
    if onnx_program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    model = onnx_program.model
    if repetition is not None:
        RepeatLayer(repetition)(model)
    _link_initializers(model, module)
    _optimize(model)
    _name_dimensions(model, inputs, outputs)
    return model


def save_graph(model: ir.Model, name: str, data: ExternalData, tokens: TokenCounts | None = None) -> GraphRecord:
    """Write a graph to ``<name>.onnx`` in the folder of its external data, and check it.

    Args:
        model: the graph; its weights are moved out of it.
        name: name of the graph in the manifest.
        data: external data of the package's graphs. The vision graphs of several grids share their weights.
        tokens: N and T of a vision graph; None for other graphs.

    Returns:
        The record of the graph in the manifest.
    """
    model.producer_name, model.producer_version = "promprune", ""
    weights = data.move(model, f"{name}.onnx_data", share=tokens is not None)
    proto = ir.to_proto(model)
    (data.folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
    _check(proto)
    return GraphRecord(
        file=f"{data.folder.name}/{name}.onnx",
        weights=tuple(f"{data.folder.name}/{file}" for file in weights),
        inputs=tuple(tensor_record(value) for value in model.graph.inputs),
        outputs=tuple(tensor_record(value) for value in model.graph.outputs),
        tokens=tokens,
    )


def _check(proto: onnx.ModelProto) -> None:
    """Check a graph without its weights: the checker refuses files with more than one hard link."""
    graph = proto.graph
    outside = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in outside
    )
    inside = [tensor for tensor in graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    del graph.initializer[:]
    graph.initializer.extend(inside)
    onnx.checker.check_model(proto, full_check=False)


def _without_repeated_layers(names: Iterable[str], repetition: Repetition | None) -> list[str]:
    """Return the names without those of the layers that are not in the trace."""
    if repetition is None:
        return list(names)
    first = repetition.template + 1
    added = {
        pattern.format(index)
        for pattern in repetition.values.values()
        for index in range(first, first + len(repetition.layers))
    }
    return [name for name in names if name not in added]


def _link_initializers(model: ir.Model, module: nn.Module) -> None:
    """Replace the initializers that a checkpoint contains by its tensors, named as the model names them."""
    for name, value in list(model.graph.initializers.items()):
        parameter = tensor_at(module, name)
        if parameter is None or linked(parameter) is None:
            continue
        replacement = initializer(parameter, name)
        ir.convenience.replace_all_uses_with(value, replacement)
        del model.graph.initializers[name]
        model.graph.register_initializer(replacement)


def _optimize(model: ir.Model) -> None:
    """Fold and simplify as ``torch.onnx`` does (``onnxscript.optimizer.optimize_ir``), but never compute with a
    checkpoint's weights.

    Folding the Transpose of a weight, for example, would give a tensor that is not on disk.
    """

    def may_fold(node: ir.Node) -> bool | None:
        values = (value.const_value for value in node.inputs if value is not None)
        return False if any(isinstance(value, CheckpointTensor) for value in values) else None

    passes.InlinePass()(model)
    for _ in range(2):
        fold_constants_ir(model, onnx_shape_inference=True, should_fold=may_fold)
        RewritePass(_RULES)(model)
        passes.RemoveUnusedNodesPass()(model)
    for step in (
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    ):
        step(model)
    onnx_fusions.fuse(model)
    ScaleQueriesOnly()(model)
    RemoveNanGuards()(model)


def tensor_record(value: ir.Value) -> TensorRecord:
    """Describe an input or output of a graph for a manifest."""
    if value.name is None or value.dtype is None or value.shape is None:
        raise RuntimeError(f"graph value {value.name!r} has no dtype or shape")
    dims = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
    return TensorRecord(name=value.name, dtype=str(value.dtype.numpy()), shape=dims)


def _name_dimensions(
    model: ir.Model, inputs: Mapping[str, Mapping[int, str]], outputs: Mapping[str, Mapping[int, str]]
) -> None:
    """Replace the exporter's names of dynamic dimensions (``s10``) by ours, in every shape."""
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
    """Hide the exporter's messages about its internals from the user."""
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
