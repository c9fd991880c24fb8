"""Errors of tensors, and matching the tensors of two graphs."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray

__all__ = [
    "TensorError",
    "compare_results",
    "relative_error",
    "rms_error",
    "same_tensors",
    "tensor_error",
    "tensors_of",
]

_MASK_SHARE: Final = 1 / 4  # share of the lowest number of a dtype; a mask is that number or half of it, plus scores


@dataclass(frozen=True, kw_only=True)
class TensorError:
    """The error of one tensor.

    Attributes:
        tensor: its name.
        node: the node that computes it, as ``operator name``.
        error: for floats, the root mean square of the difference divided by that of the reference; for integers and
            booleans, the share of elements that differ. Infinite if shapes, or NaN and infinities, differ. Mask values
            of different dtypes count as equal.
        passed: whether the error is within the tolerance.
    """

    tensor: str
    node: str
    error: float
    passed: bool

    def __bool__(self) -> bool:
        return self.passed


def tensors_of(model: onnx.ModelProto) -> dict[str, str]:
    """Return the tensors that a graph computes, in their order, with the node that computes each."""
    return {
        output: f"{node.op_type} {node.name}".strip()
        for node in model.graph.node
        if node.op_type != "Constant"
        for output in node.output
        if output
    }


def same_tensors(model: onnx.ModelProto, other: onnx.ModelProto) -> dict[str, str]:
    """Match the tensors of two graphs: tensor of the first -> tensor of the second, in the order of the first.

    Tensors match if the same operators compute them from matching tensors, ignoring casts. Names cannot be used,
    because exporters number the nodes, including casts. If several tensors match, they are paired in order.
    """
    places: dict[Hashable, list[str]] = defaultdict(list)
    for tensor, key in _keys(other).items():
        places[key].append(tensor)
    found = {}
    for tensor, key in _keys(model).items():
        if places[key]:
            found[tensor] = places[key].pop(0)
    return found


def _keys(model: onnx.ModelProto) -> dict[str, Hashable]:
    """Return a digest of the computation of each tensor; a cast has the digest of its input, and is omitted."""
    sources: dict[str, Hashable] = {value.name: value.name for value in model.graph.input}
    sources |= {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    keys: dict[str, Hashable] = {}
    for node in model.graph.node:
        if node.op_type == "Cast":
            sources[node.output[0]] = sources.get(node.input[0])
            continue
        made = hash((node.op_type, *(sources.get(name) for name in node.input)))
        for index, output in enumerate(node.output):
            sources[output] = (made, index)
            if output and node.op_type != "Constant":
                keys[output] = (made, index)
    return keys


def relative_error(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """Return the largest |difference| / standard deviation of the reference; infinite if a value is not finite."""
    difference = np.abs(value.astype(np.float64) - reference.astype(np.float64)).max()
    if not np.isfinite(difference):
        return float("inf")
    return float(difference / max(float(reference.astype(np.float64).std()), 1e-12))


def rms_error(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """Return the root mean square of the difference / standard deviation of the reference; infinite as above."""
    difference = float(np.sqrt(np.square(value.astype(np.float64) - reference.astype(np.float64)).mean()))
    if not np.isfinite(difference):
        return float("inf")
    return difference / max(float(reference.astype(np.float64).std()), 1e-12)


def tensor_error(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """Return the error of a tensor, as defined in :class:`TensorError`."""
    if value.shape != reference.shape:
        return float("inf")
    if value.size == 0:
        return 0.0
    if value.dtype.kind not in "fV" or reference.dtype.kind not in "fV":
        return float(np.mean(value != reference))
    wide, wanted = value.astype(np.float64), reference.astype(np.float64)
    if value.dtype != reference.dtype:
        compared = ~(_is_mask(value) & _is_mask(reference))
        wide, wanted = wide[compared], wanted[compared]
    finite = np.isfinite(wanted)
    if not np.array_equal(np.isfinite(wide), finite) or not np.array_equal(wide[~finite], wanted[~finite], True):
        return float("inf")
    difference = float(np.linalg.norm(wide[finite] - wanted[finite]))
    size = float(np.linalg.norm(wanted[finite]))
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def _is_mask(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which numbers are mask values: close to the lowest number of their dtype."""
    return values.astype(np.float64) <= float(ml_dtypes.finfo(values.dtype).min) * _MASK_SHARE


def compare_results(
    values: Mapping[str, Any],
    references: Mapping[str, Any],
    same: Mapping[str, str],
    nodes: Mapping[str, str],
    tolerance: float,
) -> OrderedDict[str, TensorError]:
    """Compare the matching tensors of two runs, in the order of the graph; for Polygraphy's Comparator.

    Args:
        values, references: the results, by the name of the tensor.
        same: name of a tensor -> its name in the reference.
        nodes: name of a tensor -> the node that computes it.
        tolerance: largest error that passes.
    """
    found: OrderedDict[str, TensorError] = OrderedDict()
    for tensor, counterpart in same.items():
        if tensor in values and counterpart in references:
            error = tensor_error(np.asarray(values[tensor]), np.asarray(references[counterpart]))
            found[tensor] = TensorError(tensor=tensor, node=nodes[tensor], error=error, passed=error <= tolerance)
    return found
