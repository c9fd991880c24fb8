"""What the passes around the selection require of a graph, and what they ensure."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from promprune.export.graphs.passes.selection import DropSaliency, FuseSelector
from promprune.export.graphs.selector import build_selector
from promprune.package.manifest import TokenCounts

N, D, T = 16, 8, 5


def encoder(num_tokens: int = N) -> ir.Model:
    """A graph whose features and saliency are its inputs, under other names."""
    values = []
    nodes = []
    for name, shape in (("features", ("batch_size", num_tokens, D)), ("scores", ("batch_size", num_tokens))):
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        output = {"features": "image_features", "scores": "saliency"}[name]
        node = ir.node("Identity", [value])
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = output, value.shape, value.type
        values.append(value)
        nodes.append(node)
    graph = ir.Graph(values, [node.outputs[0] for node in nodes], nodes=nodes, opset_imports={"": 20}, name="encoder")
    return ir.Model(graph, ir_version=10)


def selector(keep_tokens: int = T) -> ir.Model:
    return ir.from_proto(build_selector(N, D, keep_tokens, batch_size="batch_size"))


def test_exactly_t_tokens_leave_the_graph() -> None:
    model = FuseSelector(selector(), TokenCounts(num_tokens=N, keep_tokens=T))(encoder()).model
    shapes = {value.name: value.shape for value in model.graph.outputs}
    assert shapes["image_features"] == ir.Shape(["batch_size", T, D])
    assert "saliency" not in shapes
    assert [value.name for value in model.graph.inputs] == ["features", "scores"]


def test_a_selector_of_another_t_is_noticed() -> None:
    step = FuseSelector(selector(T - 1), TokenCounts(num_tokens=N, keep_tokens=T))
    with pytest.raises(ir.passes.PostconditionError):
        step(encoder())


@pytest.mark.parametrize("keep_tokens", [T, N])
def test_an_encoder_of_another_n_is_noticed(keep_tokens: int) -> None:
    tokens = TokenCounts(num_tokens=N, keep_tokens=keep_tokens)
    step = FuseSelector(selector(), tokens) if tokens.is_pruned else DropSaliency(tokens)
    with pytest.raises(ir.passes.PreconditionError):
        step(encoder(N + 1))


def test_without_a_selection_nothing_is_scored() -> None:
    model = DropSaliency(TokenCounts(num_tokens=N, keep_tokens=N))(encoder()).model
    assert [value.name for value in model.graph.outputs] == ["image_features"]
    assert len(list(model.graph)) == 1
