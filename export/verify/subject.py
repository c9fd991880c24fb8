"""A package and its source model, opened for verification."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from promprune.export.checkpoint.loading import Checkpoint
from promprune.export.checkpoint.out_of_core import PiecewiseSession
from promprune.export.families import Family
from promprune.export.quantize.reference import PackageWeights, package_weights
from promprune.package.package import Package
from promprune.runtime.sessions.config import RuntimeConfig
from promprune.runtime.sessions.onnxruntime import inference_session

__all__ = ["Array", "Runnable", "Subject", "run_graph"]

Array = NDArray[Any]


class Runnable(Protocol):
    """The part of ``onnxruntime.InferenceSession`` that the verification uses."""

    def get_inputs(self) -> Sequence[Any]:
        """Describe the inputs: ``name``, ``type`` and ``shape``."""

    def get_outputs(self) -> Sequence[Any]:
        """Describe the outputs in the same way."""

    def run(self, names: None, feeds: Mapping[str, Array]) -> Sequence[Any]:
        """Return all outputs, in order."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A package and its source model, opened for verification.

    Attributes:
        package: the package.
        family: its source, the transformers model in fp32.
        out_of_core: whether both run one part at a time.
        meta_model: the source without its weights, linked to the checkpoint.
        weights: the weights that the package stores in another format than its dtype; None if there are none.
    """

    package: Package
    family: Family
    out_of_core: bool
    meta_model: Any
    weights: PackageWeights | None

    @classmethod
    def of(cls, package: Package, checkpoint: Checkpoint, *, out_of_core: bool) -> Subject:
        """Load the source model; with ``out_of_core``, let it load one part at a time."""
        # ONNX Runtime runs a bf16 package in fp32, so torch has to compute in fp32 with the same weights.
        rounded_to = torch.bfloat16 if package.manifest.dtype == "bf16" else torch.float32
        weights = package_weights(package)
        if out_of_core:
            relink = weights.link_to if weights else None
            source = checkpoint.out_of_core_model(rounded_to=rounded_to, relink=relink)
        else:
            source = checkpoint.model
        return cls(
            package=package,
            family=checkpoint.family(source, checkpoint.processor, package.manifest.image.layout.grid_sizes),
            out_of_core=out_of_core,
            meta_model=checkpoint.meta_model,
            weights=weights,
        )

    @property
    def has_int8_activations(self) -> bool:
        """Whether the vision graphs quantize their activations."""
        formats = self.package.manifest.weights
        return formats is not None and formats.vision.int8_activations

    @property
    def judges_saliency(self) -> bool:
        """Whether the error of the saliency is judged itself; in half precision, the selection is (precision.py)."""
        return self.package.manifest.dtype == "fp32" or self.has_int8_activations

    @contextlib.contextmanager
    def package_weights(self) -> Iterator[None]:
        """Make the source compute with the package's weights; out of core, it always does."""
        if self.weights is None or self.out_of_core:
            yield
            return
        with self.weights.applied_to(self.family.model, self.meta_model):
            yield

    def open(self, graph: str, outputs: Sequence[str] = ()) -> Runnable:
        """Open a graph of the package; ``outputs`` are inner values to return besides its outputs."""
        path = self.package.graph_file(graph)
        if self.out_of_core:
            return PiecewiseSession(path, outputs)
        model = onnx.load(path, load_external_data=False)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        content, config = model.SerializeToString(), RuntimeConfig(provider="cpu", accuracy_level=0)
        session: Runnable = inference_session(content, config, name=str(path), weights=path.parent).session
        return session


def run_graph(session: Runnable, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run a graph once and return all its outputs by name."""
    values = session.run(None, dict(feeds))
    names = [value.name for value in session.get_outputs()]
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
