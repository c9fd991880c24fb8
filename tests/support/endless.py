"""A fake package whose decoder never returns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from promprune.package.manifest import DECODER, read_manifest
from tests.support.fake_package import rewrite_manifest, write_fake_package


def write_large_package(folder: Path, side: int) -> None:
    """Write a fake package whose logits depend on the sum of a matrix of zeros, side x side in float32."""
    write_fake_package(folder)
    nodes = [
        helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([side, side]), "shape")),
        helper.make_node("ConstantOfShape", ["shape"], ["large"]),
        helper.make_node("ReduceSum", ["large"], ["nothing"], keepdims=0),
        helper.make_node("Add", ["logits_before", "nothing"], ["logits"]),
    ]
    _change_decoder(folder, nodes)


def write_endless_package(folder: Path, trips: int = 2**62) -> None:
    """Write a fake package whose logits depend on a loop of ``trips`` rounds."""
    write_fake_package(folder)
    _change_decoder(folder, _loop(trips))


def _change_decoder(folder: Path, nodes: list[onnx.NodeProto]) -> None:
    manifest = read_manifest(folder)
    file = folder / manifest.graphs[DECODER].file
    model = onnx.load(file)
    last = model.graph.node[-1]
    last.output[0] = "logits_before"
    model.graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, file)
    rewrite_manifest(folder, manifest)


def _loop(trips: int) -> list[onnx.NodeProto]:
    """Nodes that add 0 to the logits ``trips`` times."""
    constants = {"trips": np.array(trips), "go_on": np.array(True), "nothing": np.float32(0)}
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value), name))
        for name, value in constants.items()
    ]
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["keep_going"], ["keep_going_after"]),
            helper.make_node("Add", ["sum", "nothing"], ["sum_after"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("keep_going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("keep_going_after", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_after", TensorProto.FLOAT, None),
        ],
    )
    return [*nodes, helper.make_node("Loop", ["trips", "go_on", "logits_before"], ["logits"], body=body)]
