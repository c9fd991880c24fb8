"""The error of quantization itself: the source model with a package's weights, compared with its own weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional

from promprune.errors import PrompruneError
from promprune.export.families import Family
from promprune.export.verify.language import filled_prompt, kept_position_ids, log_probabilities, torch_answer
from promprune.export.verify.samples import Sample
from promprune.export.verify.selection import choose_tokens
from promprune.package.manifest import CheckRecord, Manifest
from promprune.runtime import Result

__all__ = ["Case", "ModelRun", "cases_of", "cost_of_quantization", "run_model"]

# Values beyond these limits cause a warning. They are estimates; no trained model was measured for them. Models with
# random weights exceed them easily, because their logits are almost tied.
MIN_TOP_1: Final = 0.9
MAX_DIVERGENCE: Final = 0.1
MIN_KEPT_IN_COMMON: Final = 0.9
MIN_EQUAL_ANSWERS: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image with one question, and the tokens that the package kept, with which both models answer.

    Attributes:
        image: an image for :meth:`Family.reference`.
        question: the question about it.
        token_indices: int64 ``[T]``, as in ``promprune.runtime.TokenSelection``.
    """

    image: Image
    question: str
    token_indices: Tensor


@dataclass(frozen=True, kw_only=True)
class ModelRun:
    """The results of a model for some images with one question each.

    Attributes:
        kept: for each row (image or crop), the indices of the tokens that the model itself keeps.
        log_probabilities: for each answer ``[tokens, vocabulary]``, given the tokens before.
        answers: token ids of each greedy answer.
    """

    kept: tuple[frozenset[int], ...]
    log_probabilities: tuple[Tensor, ...]
    answers: tuple[list[int], ...]


def cases_of(samples: Sequence[Sample], answers: Sequence[Result | PrompruneError]) -> list[Case]:
    """Return a case for every sample that the package answered, with the tokens that it kept."""
    return [
        Case(
            image=sample.image,
            question=sample.question,
            token_indices=torch.as_tensor(np.array(answer.selection[0].token_indices)),
        )
        for sample, answer in zip(samples, answers, strict=True)
        if not isinstance(answer, PrompruneError)
    ]


def run_model(
    family: Family, manifest: Manifest, cases: Sequence[Case], answers: Sequence[list[int]] | None = None
) -> ModelRun:
    """Encode images, choose tokens by the float64 method, and answer.

    Args:
        family: the model.
        manifest: the manifest of the package, with the selection and its T.
        cases: the images and questions.
        answers: the answers whose probabilities are computed; None for the model's own.
    """
    kept, logits, own = [], [], []
    for index, case in enumerate(cases):
        reference = family.reference(case.image)
        kept += [frozenset(chosen.token_indices.tolist()) for chosen in choose_tokens(family, manifest, reference)]
        features = family.kept_features(reference, case.token_indices)
        positions = kept_position_ids(family, case.question, reference, case.token_indices)
        own.append(torch_answer(family, case.question, features, positions))
        given = answers[index] if answers is not None else own[-1]
        logits.append(log_probabilities(family, filled_prompt(family, case.question, features), positions, given))
    return ModelRun(kept=tuple(kept), log_probabilities=tuple(logits), answers=tuple(own))


def cost_of_quantization(source: ModelRun, quantized: ModelRun) -> Iterator[CheckRecord]:
    """Compare two runs; these checks are advisory, and never fail a verification."""
    pairs = list(zip(source.log_probabilities, quantized.log_probabilities, strict=True))
    tokens = sum(len(own) for own, _ in pairs)
    agreeing = sum(int((own.argmax(-1) == other.argmax(-1)).sum()) for own, other in pairs)
    divergence = sum(float(functional.kl_div(other, own, reduction="sum", log_target=True)) for own, other in pairs)
    common = sum(len(own & other) for own, other in zip(source.kept, quantized.kept, strict=True))
    equal = sum(own == other for own, other in zip(source.answers, quantized.answers, strict=True))
    detail = f"{tokens} tokens of {len(pairs)} answers"
    yield _cost("top-1 agreement", agreeing / max(tokens, 1), ">=", MIN_TOP_1, detail)
    yield _cost("KL divergence in nats", divergence / max(tokens, 1), "<=", MAX_DIVERGENCE, detail)
    yield _cost("kept tokens in common", common / sum(map(len, source.kept)), ">=", MIN_KEPT_IN_COMMON, "")
    yield _cost("equal answers", equal / len(pairs), ">=", MIN_EQUAL_ANSWERS, f"{equal} of {len(pairs)}")


def _cost(name: str, measured: float, comparison: Any, limit: float, detail: str) -> CheckRecord:
    passed = measured >= limit if comparison == ">=" else measured <= limit
    return CheckRecord(
        name=f"cost of quantization: {name}",
        measured=measured,
        comparison=comparison,
        limit=limit,
        passed=passed,
        detail=detail,
        advisory=True,
    )
