"""The reference selection: saliency first, coverage for the rest, always T distinct tokens.

One image at a time, in the order of the paper (arXiv 2603.14892, section on two-stage selection). Run on float64
features it is the reference that the exported graph and :mod:`promprune.method.batched` are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from promprune.errors import ConfigError
from promprune.method.config import SelectionConfig
from promprune.method.entropy import saliency_count, saliency_ratio, spectral_entropy, unit_tokens

__all__ = [
    "BLANK_NORM",
    "RESIDUAL_FLOOR",
    "TAKEN",
    "Selection",
    "check_tokens",
    "random_order",
    "select_tokens",
]

# If less than this fraction of a token's squared length is outside the span of the picked tokens, it adds nothing:
# the coverage stage treats all such tokens as tied. The value is ten times the rounding error of float32 after the
# rank is exhausted.
RESIDUAL_FLOOR = 1e-5
# In float32 an image counts as blank if the norm of its centred kernel is below this times N: its tokens are so
# similar that the rounding errors of their products, which the chain of products amplifies, would exceed the spectrum.
BLANK_NORM = 1e-3
# The loss of a token that was picked, in float32: above every other loss, and still finite.
TAKEN = 1e30


@dataclass(frozen=True)
class Selection:
    """The kept tokens of one image, and why they were kept.

    Attributes:
        token_indices: ``[T]`` int64, distinct, in the configured order.
        saliency_mask: ``[T]`` bool, true if the saliency stage picked that token.
        saliency_count: T_sal, the number of tokens that the saliency stage picked.
        spectral_entropy: normalised entropy H in [0, 1]; NaN if the features or the saliency are not finite.
        saliency_ratio: share of the budget given to saliency, before rounding.
    """

    token_indices: Tensor
    saliency_mask: Tensor
    saliency_count: int
    spectral_entropy: float
    saliency_ratio: float


def select_tokens(
    image_features: Tensor,
    saliency: Tensor,
    keep_tokens: int,
    config: SelectionConfig = SelectionConfig(),  # noqa: B008 - frozen
    token_mask: Tensor | None = None,
) -> Selection:
    """Choose T of an image's N tokens.

    Ties go to the lowest index everywhere. Padding (``token_mask`` false) is picked only once no other token is
    left, lowest index first.

    Args:
        image_features: ``[N, D]`` projector output, any floating dtype (float64 for the reference).
        saliency: ``[N]`` score of each token; larger is more salient. NaN ranks last.
        keep_tokens: the budget T, 1 to N.
        config: the budget split's parameters and the output order.
        token_mask: ``[N]`` bool, false for padding; None if there is no padding.

    Returns:
        The selection, T distinct tokens.

    Raises:
        ConfigError: shapes do not match, or T is not in 1..N.
    """
    check_tokens(image_features, saliency, keep_tokens, token_mask, axes=("N",))
    valid = torch.ones_like(saliency, dtype=torch.bool) if token_mask is None else token_mask
    entropy = spectral_entropy(image_features[valid])
    entropy = torch.where(saliency[valid].isfinite().all(), entropy, torch.nan)
    ratio = saliency_ratio(entropy, config)
    n_salient = int(saliency_count(ratio, keep_tokens))

    salient = _saliency_stage(saliency, valid, n_salient)
    if config.policy == "random":
        covering = _random_stage(valid, keep_tokens - n_salient)
    else:
        unit = unit_tokens(image_features.where(valid[:, None], 0))
        covering = _coverage_stage(unit, valid, salient, keep_tokens - n_salient)
    indices = torch.cat([salient, covering])
    mask = torch.arange(keep_tokens, device=indices.device) < n_salient
    if config.order == "spatial":
        indices, permutation = indices.sort()
        mask = mask[permutation]
    return Selection(indices, mask, n_salient, float(entropy), float(ratio))


def random_order(num_tokens: int) -> Tensor:
    """The order in which the policy "random" takes tokens: one permutation for each N, ``[N]`` int64.

    It is drawn by ``numpy.random.RandomState(0)``, which gives the same numbers in every version of numpy.
    """
    return torch.from_numpy(np.random.RandomState(0).permutation(num_tokens).astype(np.int64))


def check_tokens(
    image_features: Tensor, saliency: Tensor, keep_tokens: int, token_mask: Tensor | None, *, axes: tuple[str, ...]
) -> None:
    """Refuse tensors that do not describe the same tokens; ``axes`` names those of ``saliency``, the last one N.

    Raises:
        ConfigError: a shape, a dtype or ``keep_tokens`` is wrong.
    """
    if image_features.ndim != len(axes) + 1 or saliency.shape != image_features.shape[:-1]:
        names = ", ".join(axes)
        raise ConfigError(
            f"received image_features {list(image_features.shape)} and saliency {list(saliency.shape)}",
            expected=f"[{names}, D] and [{names}]",
        )
    n = saliency.shape[-1]
    if not 1 <= keep_tokens <= n:
        raise ConfigError(f"received keep_tokens = {keep_tokens}", expected=f"1 to {n}, the number of tokens")
    if token_mask is not None and (token_mask.shape != saliency.shape or token_mask.dtype != torch.bool):
        raise ConfigError(
            f"received token_mask {list(token_mask.shape)} of {token_mask.dtype}",
            expected=f"{list(saliency.shape)} of torch.bool",
        )


def _saliency_stage(saliency: Tensor, valid: Tensor, count: int) -> Tensor:
    """The ``count`` most salient tokens, padding and NaN last, ties to the lowest index."""
    score = torch.where(valid & ~saliency.isnan(), saliency, -torch.inf)
    # Padding after NaN after everything else; a stable sort keeps equal tokens in index order.
    rank = torch.argsort(score, descending=True, stable=True)
    rank = torch.cat([rank[valid[rank]], rank[~valid[rank]]])
    return rank[:count]


def _random_stage(valid: Tensor, count: int) -> Tensor:
    """The first ``count`` tokens of ``random_order``, padding last, lowest index first."""
    order = random_order(len(valid)).to(valid.device)
    padding = torch.arange(len(valid), device=valid.device)[~valid]
    return torch.cat([order[valid[order]], padding])[:count]


def _coverage_stage(unit: Tensor, valid: Tensor, salient: Tensor, count: int) -> Tensor:
    """Greedy MAP of a determinantal point process on the tokens that the saliency stage left.

    Keeps the loss l = 1 - d^2 of each token (the share of its squared length that the picked tokens span) and
    picks the smallest; e is the token's coordinate along the newly picked direction.
    """
    if count == 0:
        return salient[:0]
    kernel = unit @ unit.T
    loss = _initial_loss(unit, valid, salient)
    first = _first_pick(kernel, loss, salient)
    coordinates = kernel.new_zeros(count, len(loss))
    picked: list[int] = []
    for t in range(count):
        j = first if t == 0 else _least(loss)
        residual = 1 - loss[j]
        if residual >= RESIDUAL_FLOOR:
            projection = coordinates[:t, j] @ coordinates[:t]
            coordinates[t] = (kernel[j] - projection) / residual.sqrt()
        loss = loss + coordinates[t].square()
        loss[j] = torch.inf
        picked.append(j)
    return torch.tensor(picked, dtype=torch.int64, device=loss.device)


def _initial_loss(unit: Tensor, valid: Tensor, salient: Tensor) -> Tensor:
    """0 for a token to pick from, 1 for a zero vector, 2 for padding, infinite for one already picked."""
    loss = (unit.abs().amax(dim=-1) == 0).to(unit.dtype)
    loss[~valid] = 2.0
    loss[salient] = torch.inf
    return loss


def _first_pick(kernel: Tensor, loss: Tensor, salient: Tensor) -> int:
    """The token whose largest similarity to the saliency stage is least; the first one if that stage is empty."""
    overlap = kernel[:, salient].amax(dim=1) if len(salient) else torch.zeros_like(loss)
    return int(torch.where(loss == 0, overlap, 2 + loss).argmin())


def _least(loss: Tensor) -> int:
    """Index of the smallest loss; all losses within RESIDUAL_FLOOR of 1 count as 1, and the lowest index wins."""
    spanned = (loss > 1 - RESIDUAL_FLOOR) & (loss < 1.5)
    return int(torch.where(spanned, 1.0, loss).argmin())
