"""Checks of the selection: T distinct, unchanged tokens, the same as those of the method in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from promprune.export.families import Family, VisionReference
from promprune.export.verify.checks import BUDGET, Limits, check
from promprune.export.verify.subject import Array
from promprune.export.verify.vision import VisionRun, saliency_of
from promprune.method.config import SelectionConfig
from promprune.method.reference import Selection, select_tokens
from promprune.package.manifest import CheckRecord, Manifest, SelectionRecord, TokenCounts

__all__ = ["check_selection", "choose_tokens"]

MAX_SATURATED: Final = 0.9  # share of the check images
MIN_TAU_SHARE: Final = 40  # an entropy that is off by tau / 40 moves at most 0.6 % of the budget


def check_selection(
    manifest: Manifest, runs: Mapping[str, Sequence[VisionRun]], limits: Limits
) -> Iterator[CheckRecord]:
    """Compare the tokens kept by the vision graphs with those of the method in float64 on the graphs' features."""
    config = manifest.selection.config
    rows = [
        SelectedRow.of(run, index, config, manifest.tokens_of(graph))
        for graph, some in runs.items()
        for run in some
        if run.is_pruned
        for index in range(len(run.features))
    ]
    if not rows:
        return
    yield check("images without T distinct tokens in range", sum(not row.is_valid for row in rows), "==", 0)
    yield check("kept features changed by", max(row.changed_by for row in rows), "==", 0)
    identical = sum(row.kept == row.wanted for row in rows) / len(rows)
    overlap = sum(len(row.kept & row.wanted) for row in rows) / sum(len(row.wanted) for row in rows)
    detail = f"{len(rows)} images"
    yield check("kept sets equal to the float64 method's", identical, ">=", limits.identical_sets, detail)
    yield check("kept tokens in common with it", overlap, ">=", limits.overlap, detail)
    yield check("saliency count differs from it by", max(row.count_difference for row in rows), "<=", 1)
    entropy_difference = max(row.entropy_difference for row in rows)
    is_half = manifest.dtype != "fp32"  # then only the saliency count that follows from it is judged
    limit = config.tau / MIN_TAU_SHARE
    yield check("spectral entropy differs from it by", entropy_difference, "<=", limit, advisory=is_half)
    if config.policy == "promprune":
        yield check_budget(manifest.selection, rows)


def choose_tokens(family: Family, manifest: Manifest, reference: VisionReference) -> list[Selection]:
    """Select by the method in float64 from the features and saliency of a reference, for each row, such as a crop."""
    features = reference.features
    mask = reference.feeds.get("token_mask", torch.ones(features.shape[:2], dtype=torch.bool))
    keep_tokens, config = manifest.tokens_of(reference.graph).keep_tokens, manifest.selection.config
    rows = zip(features.double(), saliency_of(family, reference).double(), mask, strict=True)
    return [select_tokens(*row[:2], keep_tokens, config, row[2]) for row in rows]


def check_budget(record: SelectionRecord, rows: Sequence[SelectedRow]) -> CheckRecord:
    """Warn if mu and tau give the entire budget to one stage for almost every image."""
    ends = {"coverage": 0, "saliency": 0}
    for row in rows:
        ends["coverage"] += row.saliency_count == 0
        ends["saliency"] += row.saliency_count == row.keep_tokens
    stage, most = max(ends.items(), key=lambda item: item[1])
    constants = f"mu = {record.config.mu:g} and tau = {record.config.tau:g} ({record.parameters_from})"
    detail = f"{constants} give all to {stage} in {most} of {len(rows)}"
    return check(BUDGET, most / len(rows), "<=", MAX_SATURATED, detail, advisory=True)


@dataclass(frozen=True, kw_only=True)
class SelectedRow:
    """The selection in one batch row of a vision graph, compared with the method in float64.

    Attributes:
        keep_tokens: T according to the manifest.
        is_valid: whether there are T distinct tokens in range.
        changed_by: largest difference between a kept feature and that of the encoder.
        kept, wanted: indices of the tokens kept by the graph, and by the method.
        saliency_count: T_sal of the graph.
        count_difference, entropy_difference: differences in the saliency count and in the spectral entropy.
    """

    keep_tokens: int
    is_valid: bool
    changed_by: float
    kept: frozenset[int]
    wanted: frozenset[int]
    saliency_count: int
    count_difference: int
    entropy_difference: float

    @classmethod
    def of(cls, run: VisionRun, row: int, config: SelectionConfig, counts: TokenCounts) -> SelectedRow:
        """Compare row ``row`` of a run."""
        outputs = {name: value[row] for name, value in run.outputs.items()}
        indices, inner = outputs["token_indices"], outputs["encoder/image_features"]
        mask = torch.as_tensor(run.token_mask[row])
        want = select_tokens(_float64(inner), _float64(outputs["encoder/saliency"]), counts.keep_tokens, config, mask)
        difference = outputs["image_features"].astype(np.float64) - inner[indices.clip(0, len(inner) - 1)]
        count = int(outputs["saliency_count"][0])
        return cls(
            keep_tokens=counts.keep_tokens,
            is_valid=_is_valid(indices, counts),
            changed_by=float(np.abs(difference).max()),
            kept=frozenset(indices.tolist()),
            wanted=frozenset(want.token_indices.tolist()),
            saliency_count=count,
            count_difference=abs(count - want.saliency_count),
            entropy_difference=abs(float(outputs["spectral_entropy"][0]) - want.spectral_entropy),
        )


def _float64(array: Array) -> Tensor:
    return torch.as_tensor(array.astype(np.float64))


def _is_valid(indices: Array, counts: TokenCounts) -> bool:
    distinct = len(set(indices.tolist())) == counts.keep_tokens == len(indices)
    return distinct and bool((indices >= 0).all() and (indices < counts.num_tokens).all())
