"""How prominent an image's subject is: spectral entropy, and the share of the budget it gives to saliency.

The readable form of PromPrune's budget split (arXiv 2603.14892), with an eigensolver. In float64 it is this
project's reference; the exported graph and :mod:`promprune.method.batched` compute the same entropy from matrix
products alone (:mod:`promprune.method.entropy_table`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from promprune.method.config import SelectionConfig

__all__ = ["NORM_FLOOR", "saliency_count", "saliency_ratio", "spectral_entropy", "unit_tokens"]

# A token whose norm is below this has no direction: it becomes a zero vector.
NORM_FLOOR = 1e-8
# Eigenvalues are raised to this before they are normalised, so a blank image has entropy 1 (not 0/0).
_EIGENVALUE_FLOOR = 1e-12
_LOGIT_LIMIT = 20.0


def unit_tokens(image_features: Tensor) -> Tensor:
    """Scale every token to length one; a token shorter than ``NORM_FLOOR`` becomes zero.

    Args:
        image_features: ``[N, D]``, any floating dtype. float64 stays float64, all else becomes float32.

    Returns:
        ``[N, D]`` unit or zero vectors.
    """
    x = image_features if image_features.dtype == torch.float64 else image_features.float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm < NORM_FLOOR, torch.zeros_like(x), x / norm)


def spectral_entropy(image_features: Tensor) -> Tensor:
    """Entropy of the token covariance's spectrum, normalised to [0, 1].

    With f the unit tokens, g = f - mean(f) and p the eigenvalues of g g^T (or g^T g, whichever is smaller)
    divided by their sum: H = -sum(p ln p) / ln n, n = min(N, D). H is low if one object dominates the image, and
    high if the image is busy. A blank image has H = 1, and so has a single token.

    Args:
        image_features: ``[N, D]``, any floating dtype; computed in float64 for float64 input, else in float32.

    Returns:
        A scalar tensor; NaN if any feature is NaN or infinite.
    """
    unit = unit_tokens(image_features)
    centred = unit - unit.mean(dim=0, keepdim=True)
    n = min(centred.shape)
    if not bool(torch.isfinite(centred).all()):
        return centred.new_tensor(math.nan)
    if n < 2:
        return centred.new_tensor(1.0)
    covariance = centred @ centred.T if centred.shape[0] <= centred.shape[1] else centred.T @ centred
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp_min(_EIGENVALUE_FLOOR)
    p = eigenvalues / eigenvalues.sum()
    entropy: Tensor = -(p * p.log()).sum() / math.log(n)
    return entropy


def saliency_ratio(entropy: Tensor, config: SelectionConfig) -> Tensor:
    """Share of the budget that the saliency stage gets: a sigmoid that falls from max to min around mu.

    Args:
        entropy: normalised spectral entropy, any shape.
        config: mu, tau, and the two limits of the ratio under its policy.

    Returns:
        The ratio, within ``config.saliency_limits``, same shape and dtype; NaN stays NaN.
    """
    z = ((entropy - config.mu) / config.tau).clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT)
    low, high = config.saliency_limits
    ratio: Tensor = low + (1 - torch.sigmoid(z)) * (high - low)
    return ratio


def saliency_count(ratio: Tensor, keep_tokens: int) -> Tensor:
    """Number of tokens that the saliency stage picks: ratio * T, half to even.

    Args:
        ratio: share of the budget, any shape.
        keep_tokens: the budget T.

    Returns:
        int64, same shape, in [0, T]. A NaN ratio gives T: if the features are unusable, tokens are chosen by saliency
            alone, and the entropy, which is NaN, shows it.
    """
    count = (ratio * keep_tokens).round()
    return count.nan_to_num(nan=float(keep_tokens)).clamp(0, keep_tokens).to(torch.int64)
