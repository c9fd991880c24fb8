"""PromPrune as its authors run it: eager PyTorch, an eigensolver, a Python loop. For comparison only.

An independent implementation of arXiv 2603.14892 and its published code, including the numerical choices in which it
differs from :func:`promprune.method.reference.select_tokens`: it updates the residual d^2 instead of the loss, chooses
the first token by its similarity to the saliency stage, and has a clamp that can pick a token twice
(``repeat_fault``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from promprune.method.config import SelectionConfig


@dataclass(frozen=True)
class AuthorsSelection:
    """``features [B, T, D]``, ``indices [B, T]`` in selection order, ``counts`` (T_sal), ``entropy``."""

    features: Tensor
    indices: Tensor
    counts: list[int]
    entropy: Tensor
    num_tokens: int


@torch.no_grad()
def authors_select(
    features: Tensor,
    attention: Tensor,
    keep_tokens: int,
    *,
    mu: float = SelectionConfig.mu,
    tau: float = SelectionConfig.tau,
    repeat_fault: bool = True,
    first_token_seeds: bool = False,
) -> AuthorsSelection:
    """Select T tokens per image of ``features [B, N, D]`` by ``attention [B, N]``, in float32 (or float64).

    ``repeat_fault`` keeps the authors' clamp, which turns a picked token's minus infinity back into 0, so that a
    token is picked again after every residual is 0; without it the picks are distinct. ``first_token_seeds`` picks
    token 0 first if the saliency stage is empty: every residual is then 1, and in their code rounding decides.
    """
    x = features if features.dtype == torch.float64 else features.float()
    entropy = _entropy(x)
    span = attention.amax(1, keepdim=True) - attention.amin(1, keepdim=True)
    relevance = (attention - attention.amin(1, keepdim=True)) / (span + 1e-6)
    ratio = 1 - torch.sigmoid(((entropy - mu) / (tau + 1e-12)).clamp(-20, 20))
    picks, counts = [], []
    for b in range(len(x)):
        count = min(keep_tokens, max(0, int(torch.round(ratio[b] * keep_tokens).item())))
        salient = torch.topk(relevance[b], count, sorted=False).indices
        covering = _cover(x[b], salient, keep_tokens - count, repeat_fault, first_token_seeds)
        picks.append(torch.cat([salient, covering]))
        counts.append(count)
    indices = torch.stack(picks)
    kept = torch.stack([features[b, indices[b]] for b in range(len(x))])
    return AuthorsSelection(kept, indices, counts, entropy, x.shape[1])


def _entropy(x: Tensor) -> Tensor:
    unit = F.normalize(x, dim=-1, eps=1e-8)
    centred = unit - unit.mean(dim=1, keepdim=True)
    if x.shape[1] <= x.shape[2]:
        covariance = torch.bmm(centred, centred.transpose(1, 2))
    else:
        covariance = torch.bmm(centred.transpose(1, 2), centred)
    p = torch.linalg.eigvalsh(covariance).clamp_min(1e-12)
    p = p / p.sum(dim=-1, keepdim=True)
    entropy: Tensor = -(p * p.log()).sum(dim=-1) / math.log(p.shape[-1])
    return entropy


def _cover(x: Tensor, salient: Tensor, count: int, repeat_fault: bool, first_token_seeds: bool) -> Tensor:
    if count == 0:
        return salient[:0]
    left = torch.ones(len(x), dtype=torch.bool, device=x.device)
    left[salient] = False
    rest = torch.nonzero(left).squeeze(1)
    unit = F.normalize(x[rest], dim=-1, eps=1e-6)
    kernel = unit @ unit.T
    residual = torch.diagonal(kernel).clone()
    coordinates = torch.zeros(count, len(rest), dtype=x.dtype, device=x.device)
    chosen = torch.empty(count, dtype=torch.long, device=x.device)
    for i in range(count):
        if i == 0 and len(salient):
            j = torch.argmin((unit @ F.normalize(x[salient], dim=-1, eps=1e-6).T).amax(dim=1))
        elif i == 0 and first_token_seeds:
            j = torch.zeros((), dtype=torch.long, device=x.device)
        else:
            j = torch.argmax(residual)
        chosen[i] = j
        if i + 1 < count:
            projection = (coordinates[:i, j].unsqueeze(1) * coordinates[:i]).sum(dim=0)
            new = (kernel[j] - projection) / torch.sqrt(residual[j].clamp_min(1e-8))
            coordinates[i] = new
            residual = residual - new.square()
            residual = (
                residual.clamp_min(0) if repeat_fault else residual.where(residual.isinf(), residual.clamp_min(0))
            )
        residual[j] = -torch.inf
    return rest[chosen]
