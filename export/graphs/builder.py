"""A small builder for ONNX graphs that are written by hand, node by node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

__all__ = ["GraphBuilder", "floats", "ints"]

Constant = NDArray[Any]


def floats(value: Any) -> Constant:
    """A float32 constant."""
    return np.asarray(value, np.float32)


def ints(value: Any) -> Constant:
    """An int64 constant."""
    return np.asarray(value, np.int64)


class GraphBuilder:
    """Collects nodes; calling it appends one node and returns the name of its output.

    Arrays given as inputs become initializers of the outermost graph; equal arrays share one initializer. A builder
    with a ``parent`` collects the nodes of a subgraph: they may use the parent's names and share its initializers.
    """

    def __init__(self, parent: GraphBuilder | None = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._root: GraphBuilder = parent._root if parent else self
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def __call__(self, op_type: str, *inputs: str | Constant, **attributes: Any) -> str:
        """Append a node with one output and return that output's name."""
        return self.many(op_type, *inputs, outputs=1, **attributes)[0]

    def many(self, op_type: str, *inputs: str | Constant, outputs: int, **attributes: Any) -> list[str]:
        """Append a node with several outputs and return their names."""
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        results = [self._fresh(op_type.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op_type, names, results, name=results[0], **attributes))
        return results

    def rename(self, value: str, public_name: str) -> str:
        """Rename the output of a node of this graph, and all uses of it."""
        for node in self.nodes:
            node.input[:] = [public_name if x == value else x for x in node.input]
            node.output[:] = [public_name if x == value else x for x in node.output]
        return public_name

    def constant(self, value: Constant) -> str:
        """Name of the initializer with this value."""
        root = self._root
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in root._constants:
            name = root._fresh("constant")
            root._constants[key] = name
            root.initializers.append(numpy_helper.from_array(value, name))
        return root._constants[key]

    def _fresh(self, stem: str) -> str:
        self._root._count += 1
        return f"{stem}_{self._root._count}"
