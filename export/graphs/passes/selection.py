"""Passes that add the selection to a vision graph, or remove what only a selection needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import onnx_ir as ir
from onnx_ir.passes.common import NameFixPass, RemoveUnusedNodesPass

from promprune.package.manifest import TokenCounts

__all__ = ["IMAGE_FEATURES", "SALIENCY", "DropSaliency", "FuseSelector"]

IMAGE_FEATURES: Final = "image_features"
SALIENCY: Final = "saliency"
_SELECTED: Final = "selected_features"  # the name that the selector gives the kept features


class FuseSelector(ir.passes.InPlacePass):
    """Append the selection to a vision encoder; the kept features are then named ``image_features``.

    Requires ``image_features [B, N, D]`` and ``saliency [B, N]`` as outputs. Ensures that exactly T tokens leave.

    Args:
        selector: the selection; its nodes are moved out of it.
        tokens: N and T.
    """

    def __init__(self, selector: ir.Model, tokens: TokenCounts) -> None:
        self._selector = selector
        self._tokens = tokens

    def requires(self, model: ir.Model) -> None:
        """Check the outputs of the encoder."""
        _require_encoder(model, self._tokens)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Append the selector."""
        for value in model.graph.outputs:
            value.name = f"encoder/{value.name}"
        connect = {name: f"encoder/{name}" for name in (IMAGE_FEATURES, SALIENCY)}
        _append_graph(model, self._selector, connect=connect, prefix="selector/")
        for value in model.graph.outputs:
            if value.name == _SELECTED:
                value.name = IMAGE_FEATURES
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Check that exactly T tokens leave the graph, and their indices."""
        for name in (IMAGE_FEATURES, "token_indices"):
            _require_count(model, name, self._tokens.keep_tokens)


class DropSaliency(ir.passes.InPlacePass):
    """Keep ``image_features`` only: the unpruned baseline, without saliency.

    Requires the same outputs as :class:`FuseSelector`. Ensures that the only output is ``image_features [B, N, D]``.
    """

    def __init__(self, tokens: TokenCounts) -> None:
        self._tokens = tokens

    def requires(self, model: ir.Model) -> None:
        """Check the outputs of the encoder."""
        _require_encoder(model, self._tokens)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Remove the other outputs, and the nodes that only they need."""
        model.graph.outputs[:] = [value for value in model.graph.outputs if value.name == IMAGE_FEATURES]
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Check the only output."""
        if len(model.graph.outputs) != 1:
            raise ir.passes.PostconditionError(f"{len(model.graph.outputs)} outputs, not one")
        _require_count(model, IMAGE_FEATURES, self._tokens.num_tokens)


def _require_encoder(model: ir.Model, tokens: TokenCounts) -> None:
    for name in (IMAGE_FEATURES, SALIENCY):
        _require_count(model, name, tokens.num_tokens)


def _require_count(model: ir.Model, name: str, count: int) -> None:
    """Raise unless an output is ``[B, count, ...]``; the caller adds the name of the pass to the error."""
    shapes = {value.name: value.shape for value in model.graph.outputs}
    shape = shapes.get(name)
    if shape is None or len(shape) < 2 or shape[1] != count:
        raise ValueError(f"the output {name!r} has the shape {shape}, not [B, {count}, ...]")


def _append_graph(first: ir.Model, second: ir.Model, *, connect: Mapping[str, str], prefix: str) -> None:
    """Run ``second`` after ``first``, as one graph.

    Args:
        first: changed in place. Its outputs are then those that are not in ``connect``, and those of ``second``.
        second: its nodes are moved to ``first``.
        connect: input of ``second`` -> output of ``first``; the other inputs of ``second`` become inputs of the result.
        prefix: added to the names of ``second``'s nodes, values and initializers, but not of its inputs and outputs.
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
