"""Comparing how two backends, or two packages, compute the same graphs, tensor by tensor, through Polygraphy.

Needs onnx and polygraphy, and no PyTorch.
"""

from __future__ import annotations

from promprune.export.compare.pipeline import GraphComparison, compare_package, describe_graphs
from promprune.export.compare.runners import RUNNERS
from promprune.export.compare.tensors import TensorError

__all__ = ["RUNNERS", "GraphComparison", "TensorError", "compare_package", "describe_graphs"]
