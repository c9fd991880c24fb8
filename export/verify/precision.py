"""Checks of half precision: the kept tokens against those of transformers in fp32, and in the same half precision.

The error of the saliency does not tell whether the selection suffers, because the selection depends on the order of the
tokens. So the selection itself is judged: the kept tokens, and how many of them saliency chose. Beyond a fixed limit,
they may differ as much as transformers' own do if it computes in the same precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from promprune.export.checkpoint.loading import Checkpoint
from promprune.export.checkpoint.weights import torch_dtype
from promprune.export.families import VisionReference
from promprune.export.verify.checks import check
from promprune.export.verify.samples import Sample
from promprune.export.verify.selection import choose_tokens
from promprune.export.verify.subject import Subject
from promprune.export.verify.vision import VisionRun
from promprune.method.reference import Selection
from promprune.package.manifest import CheckRecord

__all__ = ["check_precision"]

MIN_IN_COMMON: Final = 0.95  # mean share of the kept tokens
MAX_COUNT_DIFFERENCE: Final = 0.02  # mean, as a share of T
# How much worse than transformers' own half precision a package may be: on eight images both vary by this much.
IN_COMMON_SLACK: Final = 0.05
COUNT_SLACK: Final = 0.02


@dataclass(frozen=True, kw_only=True)
class Closeness:
    """How close selections are to those in fp32, as means over images (or crops).

    Attributes:
        in_common: share of the kept tokens that fp32 keeps too.
        count_difference: difference of the saliency count, as a share of T.
    """

    in_common: float
    count_difference: float

    @classmethod
    def of(cls, got: Sequence[tuple[frozenset[int], int]], wanted: Sequence[tuple[frozenset[int], int]]) -> Closeness:
        """Compare the kept tokens and saliency counts of the same images."""
        pairs = list(zip(got, wanted, strict=True))
        return cls(
            in_common=sum(len(kept & want) / len(want) for (kept, _), (want, _) in pairs) / len(pairs),
            count_difference=sum(abs(count - want_count) / len(want) for (_, count), (want, want_count) in pairs)
            / len(pairs),
        )

    @property
    def within_limits(self) -> bool:
        """Whether no comparison with transformers' own half precision is needed."""
        return self.in_common >= MIN_IN_COMMON and self.count_difference <= MAX_COUNT_DIFFERENCE


def check_precision(
    subject: Subject,
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    references: Sequence[VisionReference],
    runs: Mapping[str, Sequence[VisionRun]],
) -> Iterator[CheckRecord]:
    """Compare the selections of a package in half precision with those of transformers in fp32.

    If they differ by more than a fixed limit, transformers selects in the same half precision, and sets the limit.
    """
    outputs = [run.outputs for some in runs.values() for run in some if run.is_pruned]
    if subject.judges_saliency or not outputs:
        return
    rows = [
        (indices, count)
        for each in outputs
        for indices, count in zip(each["token_indices"], each["saliency_count"], strict=True)
    ]
    got = [(frozenset(indices.tolist()), int(count[0])) for indices, count in rows]
    by_graph = [one for name in runs for one in references if one.graph == name]  # the order of the runs
    wanted = [
        _kept(chosen) for one in by_graph for chosen in choose_tokens(subject.family, subject.package.manifest, one)
    ]
    found, least, most, detail = Closeness.of(got, wanted), MIN_IN_COMMON, MAX_COUNT_DIFFERENCE, f"{len(got)} images"
    if not found.within_limits:
        own = _own_closeness(subject, checkpoint, samples, references)
        least = min(least, own.in_common - IN_COMMON_SLACK)
        most = max(most, own.count_difference + COUNT_SLACK)
        detail += (
            f"; transformers in {subject.package.manifest.dtype}: {own.in_common:.3f} and {own.count_difference:.3f}"
        )
    yield check("kept tokens in common with fp32", found.in_common, ">=", least, detail)
    yield check("saliency count differs from fp32's by, as a share of T", found.count_difference, "<=", most, detail)


def _own_closeness(
    subject: Subject, checkpoint: Checkpoint, samples: Sequence[Sample], references: Sequence[VisionReference]
) -> Closeness:
    """Measure how close transformers' own selections in the package's dtype are to those in fp32."""
    half = torch_dtype(subject.package.manifest.dtype)
    relink = subject.weights.link_to if subject.weights else None
    model = checkpoint.out_of_core_model(dtype=half, rounded_to=half, relink=relink)
    family = checkpoint.family(model, checkpoint.processor, subject.package.manifest.image.layout.grid_sizes)
    own, wanted = [], []
    for sample, reference in zip(samples, references, strict=True):
        own += [
            _kept(chosen) for chosen in choose_tokens(family, subject.package.manifest, family.reference(sample.image))
        ]
        wanted += [_kept(chosen) for chosen in choose_tokens(subject.family, subject.package.manifest, reference)]
    return Closeness.of(own, wanted)


def _kept(selection: Selection) -> tuple[frozenset[int], int]:
    return frozenset(selection.token_indices.tolist()), selection.saliency_count
