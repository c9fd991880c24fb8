"""Answering a data set's questions under many conditions, in torch and in the runtime.

A condition consists of what answers (torch or a package), the policy, and the number of kept tokens. Besides the
policies of an export there are, in torch only:

- ``all``: all tokens; the baseline.
- ``none``: the question without the image.
- ``oracle``: chooses with knowledge of the scene, but not of the question: first the centre of every object and one
  patch of the background in each quarter, then the rest of the objects from the centre outwards, then coverage. It
  shows how much the *model* loses with so few tokens, even if they are chosen well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final, cast

import numpy as np
import torch

from promprune.embedded.scenes import Scene
from promprune.errors import ConfigError
from promprune.export.evaluation.config import ALL, CHOICES, NONE, ORACLE, check_conditions
from promprune.export.evaluation.data import Picture
from promprune.export.evaluation.model import KeptTokens, TorchModel, VisualTokens
from promprune.method.batched import PrunedTokens, prune_tokens
from promprune.method.config import POLICIES, SelectionConfig, SelectionPolicy
from promprune.package.describe import describe_weights
from promprune.package.manifest import Manifest
from promprune.progress import NO_STEP, Step
from promprune.runtime import TokenSelection, VisionLanguagePipeline

__all__ = [
    "ALL",
    "CHOICES",
    "NONE",
    "ORACLE",
    "Condition",
    "Run",
    "ask_package",
    "ask_torch",
    "conditions",
    "oracle_saliency",
]

_PICTURES_AT_ONCE: Final = 32


@dataclass(frozen=True)
class Condition:
    """What answers, and with which tokens.

    Attributes:
        by: ``"torch"``, or the name of a package and its dtype.
        policy: ``"all"``, ``"none"``, ``"oracle"``, or a policy of the export.
        keep_tokens: T.
        num_tokens: N.
    """

    by: str
    policy: str
    keep_tokens: int
    num_tokens: int

    @property
    def ratio(self) -> float:
        """The fraction of the tokens that is kept."""
        return self.keep_tokens / self.num_tokens


@dataclass(frozen=True)
class Run:
    """The results of one condition.

    Attributes:
        condition: the condition.
        answers: for every picture the answers to its questions, in the order of the data.
        selections: for every picture its selection; empty if nothing is selected.
    """

    condition: Condition
    answers: tuple[tuple[str, ...], ...]
    selections: tuple[TokenSelection, ...] = ()


def conditions(num_tokens: int, ratios: Sequence[float], policies: Sequence[str]) -> list[Condition]:
    """Return all tokens, then every policy at every ratio below 1; ``none`` only once.

    Raises:
        ConfigError: a ratio or policy is invalid.
    """
    check_conditions(tuple(ratios), tuple(policies))
    found = [Condition("torch", ALL, num_tokens, num_tokens)]
    found += [Condition("torch", NONE, 0, num_tokens)] if NONE in policies else []
    for ratio in sorted(set(ratios), reverse=True):
        keep = max(1, round(ratio * num_tokens))
        if keep < num_tokens:
            found += [Condition("torch", policy, keep, num_tokens) for policy in policies if policy != NONE]
    return found


def ask_torch(
    model: TorchModel,
    pictures: Sequence[Picture],
    wanted: Sequence[Condition],
    config: SelectionConfig,
    *,
    max_new_tokens: int,
    step: Step = NO_STEP,
) -> list[Run]:
    """Answer every question under every condition in torch; ``step`` counts the pictures."""
    answers: list[list[tuple[str, ...]]] = [[] for _ in wanted]
    selections: list[list[TokenSelection]] = [[] for _ in wanted]
    for start in range(0, len(pictures), _PICTURES_AT_ONCE):
        part = pictures[start : start + _PICTURES_AT_ONCE]
        tokens = [model.encode(picture.load()) for picture in part]
        questions = [[question.text for question in picture.questions] for picture in part]
        for index, condition in enumerate(wanted):
            kept, chosen = select(model, part, tokens, condition, config)
            found = model.answer(kept, questions, max_new_tokens)
            answers[index] += [tuple(texts) for texts in found]
            selections[index] += chosen
        step.advance(len(part))
    return [
        Run(condition, tuple(texts), tuple(chosen))
        for condition, texts, chosen in zip(wanted, answers, selections, strict=True)
    ]


def select(
    model: TorchModel,
    pictures: Sequence[Picture],
    tokens: Sequence[VisualTokens],
    condition: Condition,
    config: SelectionConfig,
) -> tuple[list[KeptTokens | None], list[TokenSelection]]:
    """Return the kept tokens of each image, and the selections."""
    if condition.policy == NONE:
        return [None] * len(tokens), []
    if condition.policy == ALL:
        return [model.keep(one, torch.arange(one.num_tokens)) for one in tokens], []
    if condition.policy == ORACLE:
        pruned = [_oracle(picture, one, condition.keep_tokens) for picture, one in zip(pictures, tokens, strict=True)]
    else:
        policy = replace(config, policy=condition.policy)  # type: ignore[arg-type]  # one of POLICIES
        pruned = list(_pruned(tokens, condition.keep_tokens, policy))
    named = cast("SelectionPolicy", condition.policy if condition.policy in POLICIES else "promprune")
    chosen = [_selection(one, crops, named, config.order) for one, crops in zip(tokens, pruned, strict=True)]
    kept = [model.keep(one, torch.from_numpy(found.token_indices)) for one, found in zip(tokens, chosen, strict=True)]
    return list(kept), chosen


def _pruned(tokens: Sequence[VisualTokens], keep_tokens: int, config: SelectionConfig) -> Iterator[PrunedTokens]:
    """Yield the tokens chosen from the crops of each image; the crops of all images are one batch."""
    mask = torch.cat([one.token_mask for one in tokens])
    pruned = prune_tokens(
        torch.cat([one.features for one in tokens]),
        torch.cat([one.saliency for one in tokens]),
        keep_tokens,
        config=config,
        token_mask=None if mask.all() else mask,
    )
    sizes = [len(one.places) for one in tokens]
    parts = zip(*(getattr(pruned, field.name).split(sizes) for field in fields(pruned)), strict=True)
    yield from (PrunedTokens(*part) for part in parts)


def _selection(tokens: VisualTokens, crops: PrunedTokens, policy: SelectionPolicy, order: str) -> TokenSelection:
    """Combine the tokens chosen from the crops of one image, without padding."""
    places = tokens.places.gather(1, crops.token_indices)
    real = places >= 0
    indices, salient = places[real], crops.saliency_mask[real]
    ranks = indices.argsort() if order == "spatial" else torch.arange(len(indices))
    entropies = tuple(crops.spectral_entropy.tolist())
    return TokenSelection(tokens.grids, indices[ranks].numpy(), salient[ranks].numpy(), entropies, policy)


def _oracle(picture: Picture, tokens: VisualTokens, keep_tokens: int) -> PrunedTokens:
    if picture.scene is None:
        raise ConfigError("received policy = 'oracle'", expected="--data embedded: this policy needs to know the scene")
    grid = tokens.grids[0]
    if len(tokens.grids) > 1 or grid.rows != grid.columns:
        raise ConfigError(
            "received policy = 'oracle' for a model with several grids of tokens per image",
            expected="a model with one square grid per image",
            fix=f"choose from --policies {','.join(POLICIES)},{NONE}",
        )
    wanted = oracle_saliency(picture.scene(), grid.rows)
    share = min(int((wanted > 0).sum()), keep_tokens) / keep_tokens
    config = SelectionConfig(saliency_ratio_min=share, saliency_ratio_max=share)
    return prune_tokens(tokens.features, torch.from_numpy(wanted)[None], keep_tokens, config=config)


def oracle_saliency(scene: Scene, side: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Return the priority of each patch of a grid [side * side], given the scene; 0 leaves it to coverage."""
    middle = (np.arange(side) + 0.5) / side
    x, y = np.tile(middle, side), np.repeat(middle, side)
    wanted = np.zeros(side * side, np.float32)
    most = np.float32(len(wanted))
    for item in scene.objects:
        distance = np.hypot(x - item.x, y - item.y)
        own = int(item.y * side) * side + int(item.x * side)
        inside = [int(patch) for patch in np.argsort(distance, kind="stable") if distance[patch] < item.radius]
        for rank, patch in enumerate([own, *(patch for patch in inside if patch != own)]):
            wanted[patch] = max(wanted[patch], most - rank)
    for centre_x, centre_y in ((0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)):
        free = np.where(wanted > 0, np.inf, np.hypot(x - centre_x, y - centre_y))
        wanted[int(np.argmin(free))] = most - 0.5
    return wanted


def ask_package(folder: Path, pictures: Sequence[Picture], *, max_new_tokens: int, step: Step = NO_STEP) -> Run:
    """Answer every question with a package in the runtime; all questions about a picture are one batch."""
    with VisionLanguagePipeline.from_package(folder) as pipeline:
        found = list(_answers(pipeline, pictures, max_new_tokens, step))
        tokens = pipeline.manifest.tokens_of()
        policy = pipeline.manifest.selection.config.policy if tokens.is_pruned else ALL
    selections = tuple(selection for _, selection in found)
    condition = Condition(_name_of(pipeline.manifest), policy, tokens.keep_tokens, tokens.num_tokens)
    return Run(condition, tuple(texts for texts, _ in found), selections if selections[0].ran else ())


def _name_of(manifest: Manifest) -> str:
    return f"runtime, {describe_weights(manifest)}"


def _answers(
    pipeline: VisionLanguagePipeline, pictures: Sequence[Picture], max_new_tokens: int, step: Step
) -> Iterator[tuple[tuple[str, ...], TokenSelection]]:
    for picture in pictures:
        image = pipeline.encode_image(picture.load())
        requests = [(image, question.text) for question in picture.questions]
        results = pipeline.generate_batch(requests, max_new_tokens=max_new_tokens)
        yield tuple(result.text.strip() for result in results), image.selection
        step.advance()
