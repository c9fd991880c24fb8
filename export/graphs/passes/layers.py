"""Deep stacks of equal layers: traced with two layers, and completed in the graph.

Tracing takes most of an export's time, which grows with the number of layers. A stack is traced with its first two
layers only; the nodes of the second are then repeated for every omitted layer, each with its own weights, its own
KV cache and the hidden states of the previous layer.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass
from torch import nn

from promprune.export.checkpoint.weights import initializer, tensor_at

__all__ = ["Repetition", "alike", "repeat_layer", "with_layers"]

_SCOPES: Final = "pkg.torch.onnx.name_scopes"
_IGNORED_STATE: Final = frozenset({"layer_idx", "training"})  # what may differ between equal layers


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """Layers that were omitted from a trace.

    Attributes:
        path: path of the traced stack in the traced module, such as ``"language_model.layers"``.
        template: index in the stack of the layer to repeat; at least 1. The trace may end with layers after it.
        layers: the omitted layers, which belong directly after the template, in order.
        values: names of the template's graph inputs and outputs -> a pattern with ``{}`` for the layer's index.
    """

    path: str
    template: int
    layers: Sequence[nn.Module]
    values: Mapping[str, str] = field(default_factory=dict)


def alike(layers: Iterable[nn.Module]) -> bool:
    """Return whether layers differ only in their weights: their modules, shapes and settings are equal."""
    return len({_describe(layer) for layer in layers}) <= 1


def with_layers(stack: nn.Module, layers: Sequence[nn.Module]) -> Any:
    """Return a shallow copy of ``stack`` with other ``layers``."""
    shallow = copy.copy(stack)
    shallow._modules = {**stack._modules, "layers": nn.ModuleList(layers)}
    return shallow


def repeat_layer(model: ir.Model, repetition: Repetition) -> None:
    """Insert the omitted layers after the template.

    Args:
        model: the traced graph before any optimization, with its nodes in the order of the program.
        repetition: the layers to insert.

        Raises:
        RuntimeError: the template does not map hidden states to hidden states.
    """
    IdentityEliminationPass()(model)
    graph = model.graph
    previous = _nodes_of(graph, f"{repetition.path}.{repetition.template - 1}")
    template = _nodes_of(graph, f"{repetition.path}.{repetition.template}")
    prefix = f"{repetition.path}.{repetition.template}."
    made = {value for node in template for value in node.outputs}
    hidden_out = _only(
        [value for value in made if not value.is_graph_output() and any(u.node not in template for u in value.uses())],
        "value that leaves the layer",
    )
    hidden_in = _only(
        [
            value
            for value in {value for node in template for value in node.inputs if value is not None}
            if value.producer() in previous and (value.dtype, value.shape) == (hidden_out.dtype, hidden_out.shape)
        ],
        "value that enters the layer",
    )
    users = [use for use in hidden_out.uses() if use.node not in template]
    last, current = template[-1], hidden_out
    for index, layer in enumerate(repetition.layers, start=repetition.template + 1):
        label = f"{repetition.path}[{index}]."  # unlike any name in the trace
        known: dict[ir.Value, ir.Value] = {hidden_in: current}
        for name, value in list(graph.initializers.items()):
            if name.startswith(prefix):
                tensor = tensor_at(layer, name.removeprefix(prefix))
                if tensor is None:
                    raise RuntimeError(f"{name} is not a tensor of its layer")
                known[value] = initializer(tensor, label + name.removeprefix(prefix))
                graph.register_initializer(known[value])
        for value in list(graph.inputs):
            if value.name in repetition.values:
                known[value] = _like(value, repetition.values[str(value.name)].format(index))
                graph.inputs.append(known[value])
        nodes = [_clone(node, known, label) for node in template]
        graph.insert_after(last, nodes)
        for value in list(graph.outputs):
            if value.name in repetition.values:
                known[value].name = repetition.values[str(value.name)].format(index)
                graph.outputs.append(known[value])
        last, current = nodes[-1], known[hidden_out]
    for node, input_index in users:
        node.replace_input_with(input_index, current)


def _nodes_of(graph: ir.Graph, scope: str) -> list[ir.Node]:
    """Return the nodes from the first to the last one of a scope, including any that the exporter put in between."""
    nodes = list(graph)
    inside = [index for index, node in enumerate(nodes) if scope in node.metadata_props.get(_SCOPES, "").split("'")]
    if not inside:
        raise RuntimeError(f"the trace has no nodes of {scope}")
    return nodes[inside[0] : inside[-1] + 1]


def _clone(node: ir.Node, known: dict[ir.Value, ir.Value], label: str) -> ir.Node:
    outputs = [_like(value, f"{label}{value.name}") for value in node.outputs]
    known.update(zip(node.outputs, outputs, strict=True))
    return ir.Node(
        node.domain,
        node.op_type,
        [value if value is None else known.get(value, value) for value in node.inputs],
        node.attributes.values(),
        overload=node.overload,
        outputs=outputs,
        version=node.version,
        name=f"{label}{node.name}",
    )


def _like(value: ir.Value, name: str) -> ir.Value:
    return ir.Value(name=name, shape=value.shape, type=value.type)


def _only(values: Sequence[ir.Value], what: str) -> ir.Value:
    if len(values) != 1:
        raise RuntimeError(f"expected one {what}, found {sorted(str(value.name) for value in values)}")
    return values[0]


def _describe(layer: nn.Module) -> str:
    """Describe everything in a layer that affects its trace."""
    parts = [repr(layer)]
    for name, module in layer.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if key not in _IGNORED_STATE and isinstance(value, (bool, int, float, str, tuple, type(None)))
        }
        shapes = {key: (tuple(p.shape), p.dtype) for key, p in module.named_parameters(recurse=False)}
        parts.append(f"{name} {sorted(settings.items())} {sorted(shapes.items())}")
    return "\n".join(parts)
