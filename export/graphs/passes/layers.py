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

__all__ = ["RepeatLayer", "Repetition", "alike", "with_layers"]

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


class RepeatLayer(ir.passes.InPlacePass):
    """Insert the omitted layers after the template.

    Requires a traced graph before any optimization, with its nodes in the order of the program, in which the template
    maps hidden states to hidden states. Ensures that every layer has its own graph inputs and outputs.

    Args:
        repetition: the layers to insert.
    """

    def __init__(self, repetition: Repetition) -> None:
        self._repetition = repetition

    def requires(self, model: ir.Model) -> None:
        """Check that the template and the layer before it were traced."""
        for index in (self._repetition.template - 1, self._repetition.template):
            _nodes_of(model.graph, f"{self._repetition.path}.{index}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Clone the template once for each layer, each fed by the one before."""
        IdentityEliminationPass()(model)
        graph, repetition = model.graph, self._repetition
        previous = _nodes_of(graph, f"{repetition.path}.{repetition.template - 1}")
        template = _nodes_of(graph, f"{repetition.path}.{repetition.template}")
        hidden_in, hidden_out = _hidden_states(previous, template)
        users = [use for use in hidden_out.uses() if use.node not in template]
        last, current = template[-1], hidden_out
        for index, layer in enumerate(repetition.layers, start=repetition.template + 1):
            label = f"{repetition.path}[{index}]."  # unlike any name in the trace
            known = {hidden_in: current, **self._weights(graph, layer, label), **self._inputs(graph, index)}
            nodes = [_clone(node, known, label) for node in template]
            graph.insert_after(last, nodes)
            self._name_outputs(graph, known, index)
            last, current = nodes[-1], known[hidden_out]
        for node, input_index in users:
            node.replace_input_with(input_index, current)
        return ir.passes.PassResult(model, modified=bool(repetition.layers))

    def ensures(self, model: ir.Model) -> None:
        """Check the names of the graph's inputs and outputs."""
        names = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
        first = self._repetition.template + 1
        for pattern in self._repetition.values.values():
            for index in range(first, first + len(self._repetition.layers)):
                if pattern.format(index) not in names:
                    raise ir.passes.PostconditionError(f"no input or output {pattern.format(index)}")

    def _weights(self, graph: ir.Graph, layer: nn.Module, label: str) -> dict[ir.Value, ir.Value]:
        """Return the template's initializers -> new ones with the weights of a layer."""
        prefix = f"{self._repetition.path}.{self._repetition.template}."
        known = {}
        for name, value in list(graph.initializers.items()):
            if name.startswith(prefix):
                tensor = tensor_at(layer, name.removeprefix(prefix))
                if tensor is None:
                    raise RuntimeError(f"{name} is not a tensor of its layer")
                known[value] = initializer(tensor, label + name.removeprefix(prefix))
                graph.register_initializer(known[value])
        return known

    def _inputs(self, graph: ir.Graph, index: int) -> dict[ir.Value, ir.Value]:
        """Return the template's graph inputs -> new ones of another layer."""
        values = self._repetition.values
        known = {
            value: _like(value, values[str(value.name)].format(index)) for value in graph.inputs if value.name in values
        }
        graph.inputs.extend(known.values())
        return known

    def _name_outputs(self, graph: ir.Graph, known: Mapping[ir.Value, ir.Value], index: int) -> None:
        """Make the clones of the template's graph outputs outputs of another layer."""
        for value in list(graph.outputs):
            if value.name in self._repetition.values:
                known[value].name = self._repetition.values[str(value.name)].format(index)
                graph.outputs.append(known[value])


def _hidden_states(previous: Sequence[ir.Node], template: Sequence[ir.Node]) -> tuple[ir.Value, ir.Value]:
    """Return the value that enters the template from the layer before it, and the one that leaves the template."""
    made = {value for node in template for value in node.outputs}
    leaving = [
        value for value in made if not value.is_graph_output() and any(u.node not in template for u in value.uses())
    ]
    hidden_out = _only(leaving, "value that leaves the layer")
    taken = {value for node in template for value in node.inputs if value is not None}
    entering = [
        value
        for value in taken
        if value.producer() in previous and (value.dtype, value.shape) == (hidden_out.dtype, hidden_out.shape)
    ]
    return _only(entering, "value that enters the layer"), hidden_out


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
