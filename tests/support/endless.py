"""A fake package whose decoder never returns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from promprune.package.manifest import DECODER, read_manifest
from tests.support.fake_package import rewrite_manifest, write_fake_package


def write_endless_package(folder: Path, trips: int = 2**62) -> None:
    """Write a fake package whose logits depend on a loop of ``trips`` rounds."""
    write_fake_package(folder)
    manifest = read_manifest(folder)
    file = folder / manifest.graphs[DECODER].file
    model = onnx.load(file)
    last = model.graph.node[-1]
    last.output[0] = "logits_before"
    model.graph.node.extend(_loop(trips))
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
