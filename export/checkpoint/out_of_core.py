"""Out-of-core execution: running a graph or a model that does not fit into memory, one part at a time.

Both sides of a verification can run like this: an ONNX graph as a sequence of pieces, each in a separate session, and
a transformers model whose modules load their weights from the checkpoint when they are called and free them afterwards.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import external_data_helper
from torch import nn

from promprune.dtypes import BY_NUMPY
from promprune.export.checkpoint.weights import linked
from promprune.runtime.sessions.config import RuntimeConfig
from promprune.runtime.sessions.onnxruntime import inference_session

__all__ = ["PiecewiseSession", "available_memory", "load_weights", "load_weights_on_call"]

Array = NDArray[Any]

PIECE_BYTES: Final = 64 * 1024 * 1024  # weights in one session
KEPT_BYTES: Final = 1024 * 1024  # modules with fewer weights than this keep them

_MEMORY_INFO: Final = Path("/proc/meminfo")
_MEMORY_LIMITS: Final = (  # limits of the container that this process runs in
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


@dataclass(frozen=True)
class Argument:
    """An input or output of a graph, as ``onnxruntime.NodeArg`` describes it."""

    name: str
    type: str
    shape: list[int | str]


class PiecewiseSession:
    """An ONNX graph with the interface of ``onnxruntime.InferenceSession`` that holds one piece in memory at a time.

    The graph is divided, in the order of its nodes, into pieces with at most ``PIECE_BYTES`` of weights; a product
    with a larger matrix, such as the head of a language model, is computed for some columns at a time. A graph in
    bfloat16, which ONNX Runtime cannot run on a CPU, is computed in float32 with the same weights.

    Args:
        path: the ``.onnx`` file; its weights are in the same folder.
        outputs: further values to return besides the graph's outputs.
    """

    def __init__(self, path: Path, outputs: Sequence[str] = ()) -> None:
        self._folder = path.parent
        self._model = onnx.load(path, load_external_data=False)
        self._widen = _uses_bfloat16(self._model.graph)
        graph = self._model.graph
        _slice_large_products(graph)
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._inputs = [_argument(value) for value in graph.input if value.name not in self._initializers]
        self._outputs = [*(_argument(value) for value in graph.output), *(Argument(name, "", []) for name in outputs)]
        self._pieces = list(self._cut())

    def get_inputs(self) -> list[Argument]:
        """Describe the graph's inputs."""
        return self._inputs

    def get_outputs(self) -> list[Argument]:
        """Describe the outputs."""
        return self._outputs

    def run(self, names: None, feeds: Mapping[str, Array]) -> list[Array]:
        """Run every piece in turn and return all outputs."""
        values = {name: self._widen_array(array) for name, array in feeds.items()}
        last_use = {name: index for index, piece in enumerate(self._pieces) for name in _used(piece)}
        wanted = {value.name for value in self._outputs}
        for index, piece in enumerate(self._pieces):
            made = [name for node in piece for name in node.output if name]
            leaving = [name for name in made if name in wanted or last_use.get(name, -1) > index]
            values.update(self._run_piece(piece, leaving, values))
            _return_free_memory()
            values = {name: array for name, array in values.items() if name in wanted or last_use.get(name, -1) > index}
        return [values[value.name] for value in self._outputs]

    def _cut(self) -> Iterator[list[onnx.NodeProto]]:
        piece: list[onnx.NodeProto] = []
        weights: set[str] = set()
        for node in self._model.graph.node:
            added = weights | (_used([node]) & self._initializers.keys())
            if piece and sum(_nbytes(self._initializers[name]) for name in added) > PIECE_BYTES and added != weights:
                yield piece
                piece, added = [], _used([node]) & self._initializers.keys()
            piece.append(node)
            weights = added
        yield piece

    def _run_piece(
        self, nodes: Sequence[onnx.NodeProto], leaving: Sequence[str], values: Mapping[str, Array]
    ) -> dict[str, Array]:
        used = _used(nodes)
        graph = onnx.GraphProto(name="piece", node=nodes)
        feeds = {name: values[name] for name in used & values.keys()}
        for name in sorted(used & self._initializers.keys()):
            tensor = self._initializers[name]
            if tensor.data_type == onnx.TensorProto.BFLOAT16:
                feeds[name] = self._widen_tensor(tensor)
            else:
                graph.initializer.append(tensor)
        for name in sorted(feeds):
            dtype = onnx.helper.np_dtype_to_tensor_dtype(feeds[name].dtype)
            graph.input.append(onnx.helper.make_tensor_value_info(name, dtype, [None] * feeds[name].ndim))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in leaving)
        if self._widen:
            _widen_nodes(graph)
        model = onnx.ModelProto(
            ir_version=self._model.ir_version, opset_import=self._model.opset_import, graph=graph
        ).SerializeToString()
        session = inference_session(model, RuntimeConfig(provider="cpu"), weights=self._folder, low_memory=True).session
        outputs = session.run(list(leaving), feeds)
        return {name: np.asarray(value) for name, value in zip(leaving, outputs, strict=True)}

    def _widen_array(self, array: Array) -> Array:
        return array.astype(np.float32) if array.dtype == ml_dtypes.bfloat16 else array

    def _widen_tensor(self, tensor: onnx.TensorProto) -> Array:
        if not external_data_helper.uses_external_data(tensor):
            return onnx.numpy_helper.to_array(tensor).astype(np.float32)
        info = external_data_helper.ExternalDataInfo(tensor)
        count = math.prod(tensor.dims)
        stored = np.fromfile(self._folder / info.location, ml_dtypes.bfloat16, count, offset=info.offset or 0)
        return stored.astype(np.float32).reshape(tensor.dims)


def load_weights_on_call(model: nn.Module, *, rounded_to: torch.dtype) -> None:
    """Make the modules of a model on the meta device load their weights when they are called, and free them afterwards.

    Convolutions keep their weights, a few megabytes, and so do modules that contain others: their parameters are used
    without calling them, such as the patch embedding of Qwen and ``image_newline`` of LLaVA-NeXT.

    Args:
        model: the model; every parameter is linked to its tensor in a checkpoint.
        rounded_to: dtype that the weights are rounded to before they are converted to the model's dtype.
    """
    for module in model.modules():
        links = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
        small = sum(parameter.nbytes for parameter in links.values()) < KEPT_BYTES
        if small or isinstance(module, (nn.Conv2d, nn.Conv3d)) or any(module.children()):
            _Load(links, rounded_to)(module, ())
            continue
        module.register_forward_pre_hook(_Load(links, rounded_to))
        module.register_forward_hook(_Forget(links))


def load_weights(model: nn.Module) -> None:
    """Load all weights of a model on the meta device, each linked to its tensor of a checkpoint."""
    loaded: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            weight = linked(parameter) if parameter is not None else None
            if parameter is None or weight is None:
                continue
            if parameter not in loaded:
                loaded[parameter] = nn.Parameter(weight.stored.read(parameter.dtype), requires_grad=False)
            module._parameters[name] = loaded[parameter]


@dataclass(frozen=True)
class _Load:
    links: Mapping[str, nn.Parameter]
    rounded_to: torch.dtype

    def __call__(self, module: nn.Module, args: Any) -> None:
        for name, parameter in self.links.items():
            weight = linked(parameter)
            if weight is not None:
                values = weight.stored.read(self.rounded_to).to(parameter.dtype)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)


@dataclass(frozen=True)
class _Forget:
    links: Mapping[str, nn.Parameter]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        module._parameters.update(self.links)
        _return_free_memory()


def available_memory() -> int:
    """Return how many bytes this process can still allocate; the machine's memory if the system does not tell."""
    found = []
    if _MEMORY_INFO.is_file():
        lines = dict(line.split(":", 1) for line in _MEMORY_INFO.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    for limit, current in _MEMORY_LIMITS:
        if limit.is_file() and limit.read_text().strip().isdigit():
            found.append(int(limit.read_text()) - int(current.read_text()))
    if not found:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(found))


def _return_free_memory() -> None:
    """Return freed memory to the system: glibc would keep it, in fragments too small for the next part."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _used(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    """Return the names of all values that nodes and their subgraphs use but do not compute themselves."""
    used: set[str] = set()
    made: set[str] = set()
    for node in nodes:
        names = {name for name in node.input if name}
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                inner = attribute.g
                known = {value.name for value in inner.input} | {tensor.name for tensor in inner.initializer}
                results = {value.name for value in inner.output} - {name for n in inner.node for name in n.output}
                names |= (_used(inner.node) | results) - known
        used |= names - made
        made |= set(node.output)
    return used


def _slice_large_products(graph: onnx.GraphProto) -> None:
    """Split ``MatMul(x, Transpose(w))`` by rows of ``w`` if ``w`` has more than ``PIECE_BYTES``."""
    large = {tensor.name: tensor for tensor in graph.initializer if _nbytes(tensor) > PIECE_BYTES}
    factors = {node.input[1] for node in graph.node if node.op_type == "MatMul"}
    slices: dict[str, list[onnx.TensorProto]] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in large and node.output[0] in factors:
            slices[node.output[0]] = _rows_of(large[node.input[0]])
        elif node.op_type == "MatMul" and node.input[1] in slices:
            graph.initializer.extend(slices[node.input[1]])
            nodes += _product_in_parts(node, slices[node.input[1]])
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _rows_of(tensor: onnx.TensorProto) -> list[onnx.TensorProto]:
    """Divide a matrix in an external file into groups of rows of at most ``PIECE_BYTES`` each."""
    info = external_data_helper.ExternalDataInfo(tensor)
    rows, columns = tensor.dims
    row_bytes = _nbytes(tensor) // rows
    step = max(1, PIECE_BYTES // row_bytes)
    parts = []
    for begin in range(0, rows, step):
        count = min(step, rows - begin)
        part = onnx.TensorProto(
            name=f"{tensor.name}[{begin}:]", data_type=tensor.data_type, dims=[count, columns], data_location="EXTERNAL"
        )
        place = {
            "location": info.location,
            "offset": (info.offset or 0) + begin * row_bytes,
            "length": count * row_bytes,
        }
        part.external_data.extend(
            onnx.StringStringEntryProto(key=key, value=str(value)) for key, value in place.items()
        )
        parts.append(part)
    return parts


def _product_in_parts(product: onnx.NodeProto, rows: Sequence[onnx.TensorProto]) -> list[onnx.NodeProto]:
    nodes, made = [], []
    for part in rows:
        columns, product_of = f"{part.name}/transposed", f"{product.output[0]}/{part.name}"
        nodes.append(onnx.helper.make_node("Transpose", [part.name], [columns], perm=[1, 0]))
        nodes.append(onnx.helper.make_node("MatMul", [product.input[0], columns], [product_of]))
        made.append(product_of)
    return [*nodes, onnx.helper.make_node("Concat", made, product.output, axis=-1)]


def _nbytes(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _uses_bfloat16(graph: onnx.GraphProto) -> bool:
    values = [*graph.input, *graph.output]
    return any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in graph.initializer) or any(
        value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16 for value in values
    )


def _widen_nodes(graph: onnx.GraphProto) -> None:
    """Replace bfloat16 by float32 in casts and constants."""
    copies = [onnx.NodeProto() for _ in graph.node]
    for copy, node in zip(copies, graph.node, strict=True):
        copy.CopyFrom(node)
        for attribute in copy.attribute:
            if copy.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.BFLOAT16:
                attribute.i = onnx.TensorProto.FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == onnx.TensorProto.BFLOAT16:
                array = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(array, attribute.t.name))
    del graph.node[:]
    graph.node.extend(copies)


def _argument(value: onnx.ValueInfoProto) -> Argument:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return Argument(value.name, BY_NUMPY[dtype.name].onnxruntime, shape)
