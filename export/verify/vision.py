"""Checks of the vision graphs: features and saliency against transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from promprune.export.families import Family, VisionModule, VisionReference
from promprune.export.verify.checks import Limits, check
from promprune.export.verify.subject import Array, Subject, run_graph
from promprune.export.verify.tensors import relative_error, rms_error
from promprune.package.manifest import CheckRecord

__all__ = ["VisionRun", "check_vision", "run_vision", "saliency_of"]

BATCH_SIZE: Final = 8
# With activations in int8, a difference of 1e-7 can round to the next integer, and grows from layer to layer: on the
# embedded model, graph and torch differ by 1.3 % (features) and 2.2 % (saliency), as root mean squares.
INT8_RMS_ERROR: Final = 0.1
CHOSEN_FROM: Final = ("encoder/image_features", "encoder/saliency")  # the inputs of the selection inside a graph


@dataclass(frozen=True, kw_only=True)
class VisionRun:
    """The results of a vision graph and of torch for some images.

    Attributes:
        outputs: outputs of the graph by name, ``[B, ...]``; with a selection, also its inputs
            ``encoder/image_features [B, N, D]`` and ``encoder/saliency [B, N]``.
        features: ``[B, N, D]`` from transformers.
        saliency: ``[B, N]`` from transformers, or from the exported module if the family cannot get it there.
        is_independent: whether the saliency is transformers'.
        token_mask: bool ``[B, N]``, false for padding.
    """

    outputs: dict[str, Array]
    features: Array
    saliency: Array
    is_independent: bool
    token_mask: Array

    @property
    def is_pruned(self) -> bool:
        """Whether the graph contains a selection."""
        return "token_indices" in self.outputs

    @property
    def all_features(self) -> Array:
        """The graph's features of all tokens, ``[B, N, D]``."""
        return self.outputs["encoder/image_features" if self.is_pruned else "image_features"]


def run_vision(subject: Subject, references: Sequence[VisionReference]) -> dict[str, list[VisionRun]]:
    """Run every vision graph on the images that it takes; return the runs by the name of the graph."""
    return {
        vision.name: list(_runs(subject, vision, [one for one in references if one.graph == vision.name]))
        for vision in subject.family.vision_modules
    }


def check_vision(
    runs: Mapping[str, Sequence[VisionRun]], limits: Limits, *, judge_saliency: bool, int8_activations: bool = False
) -> Iterator[CheckRecord]:
    """Compare features and saliency with torch.

    Args:
        runs: of every vision graph.
        limits: of the package's dtype.
        judge_saliency: whether the error of the saliency can fail the verification; if not, it is only reported.
        int8_activations: whether the graphs quantize their activations.
    """
    if unseen := [name for name, some in runs.items() if not some]:
        yield check("vision graphs without an image", len(unseen), "==", 0, ", ".join(unseen))
    every = [run for some in runs.values() for run in some]
    name, measure, limit = "relative error", relative_error, limits.relative_error
    if int8_activations:
        name, measure, limit = "rms error", rms_error, INT8_RMS_ERROR
    error = max(measure(run.all_features, run.features) for run in every)
    yield check(f"image features, {name}", error, "<=", limit)
    if pruned := [run for run in every if run.is_pruned]:
        error = max(measure(run.outputs["encoder/saliency"], run.saliency) for run in pruned)
        detail = "" if all(run.is_independent for run in pruned) else "against the exported module, not transformers"
        yield check(f"saliency, {name}", error, "<=", limit, detail, advisory=not judge_saliency)


def saliency_of(family: Family, reference: VisionReference) -> Tensor:
    """Return the saliency ``[B, N]`` of a reference; from the exported module if transformers does not give it."""
    if reference.saliency is not None:
        return reference.saliency
    vision = next(vision for vision in family.vision_modules if vision.name == reference.graph)
    saliency: Tensor = vision.module(*(reference.feeds[name] for name in vision.inputs))[1]
    return saliency


def _runs(subject: Subject, vision: VisionModule, references: Sequence[VisionReference]) -> Iterator[VisionRun]:
    """Run a vision graph in ONNX Runtime and in torch, on several images at a time if it is batched."""
    counts = subject.package.manifest.tokens_of(vision.name)
    session = subject.open(vision.name, CHOSEN_FROM if counts.is_pruned else ())
    if subject.out_of_core and vision.is_batched:
        references = [row for reference in references for row in _rows(reference)]
    size = BATCH_SIZE if vision.is_batched and not subject.out_of_core else 1
    for begin in range(0, len(references), size):
        group = references[begin : begin + size]
        feeds = {name: torch.cat([reference.feeds[name] for reference in group]) for name in group[0].feeds}
        taken = {value.name for value in session.get_inputs()}
        outputs = run_graph(session, {name: value.numpy() for name, value in feeds.items() if name in taken})
        features = torch.cat([reference.features for reference in group])
        saliency = torch.cat([saliency_of(subject.family, reference) for reference in group])
        mask = feeds.get("token_mask", torch.ones(features.shape[:2], dtype=torch.bool))
        yield VisionRun(
            outputs=outputs,
            features=features.numpy(),
            saliency=saliency.numpy(),
            is_independent=group[0].saliency is not None,
            token_mask=mask.numpy(),
        )


def _rows(reference: VisionReference) -> Iterator[VisionReference]:
    """Yield the rows of a batch one by one, such as the crops of an image."""
    for row in range(len(reference.features)):
        taken = slice(row, row + 1)
        yield replace(
            reference,
            feeds={name: value[taken] for name, value in reference.feeds.items()},
            features=reference.features[taken],
            saliency=None if reference.saliency is None else reference.saliency[taken],
        )
