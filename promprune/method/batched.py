"""PromPrune for PyTorch models: T of N visual tokens per image, batched and without host synchronisation.

The formulation is that of the exported graph (:mod:`promprune.export.graphs.selector`): spectral entropy from matrix
products, the loss form of the greedy stage, one fixed number of output tokens. On CUDA the greedy stage is one fused
kernel (:mod:`promprune.method.triton_kernel`) if Triton is installed; otherwise it is the loop below, its reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from promprune.method.config import SelectionConfig
from promprune.method.entropy import NORM_FLOOR, saliency_count, saliency_ratio
from promprune.method.entropy_table import ENTROPY_TABLE
from promprune.method.reference import BLANK_NORM, RESIDUAL_FLOOR, TAKEN, check_tokens, random_order

__all__ = ["PrunedTokens", "coverage_picks", "prune_tokens"]

_TINY = 1e-30


@dataclass(frozen=True)
class PrunedTokens:
    """The kept tokens of a batch of images, all on the device of the features.

    Attributes:
        features: ``[B, T, D]``, dtype of the input.
        token_indices: ``[B, T]`` int64, distinct within an image, in the configured order.
        saliency_mask: ``[B, T]`` bool, true if the saliency stage picked that token.
        saliency_count: ``[B]`` int64, how many tokens that stage picked.
        spectral_entropy: ``[B]`` float32 in [0, 1]; NaN if features or saliency are not finite.
    """

    features: Tensor
    token_indices: Tensor
    saliency_mask: Tensor
    saliency_count: Tensor
    spectral_entropy: Tensor


@torch.no_grad()
def prune_tokens(
    image_features: Tensor,
    saliency: Tensor,
    keep_tokens: int,
    *,
    config: SelectionConfig = SelectionConfig(),  # noqa: B008 - frozen
    token_mask: Tensor | None = None,
) -> PrunedTokens:
    """Keep T tokens of every image, chosen by saliency and coverage (PromPrune, arXiv 2603.14892).

    Ties go to the lowest index. Padding is kept only once an image has no other token left, lowest index first.
    Everything is computed in float32, without gradients and without host synchronisation.

    Args:
        image_features: ``[B, N, D]`` projector output, any floating dtype.
        saliency: ``[B, N]`` score of each token, for CLIP the attention of the CLS token; keep it in float32.
        keep_tokens: the budget T, 1 to N.
        config: policy, parameters of the budget split, output order.
        token_mask: ``[B, N]`` bool, false for padding; None if there is no padding.

    Returns:
        The kept tokens, and the values that decided the choice.

    Raises:
        ConfigError: shapes or dtypes do not match, or T is not in 1..N.
    """
    check_tokens(image_features, saliency, keep_tokens, token_mask, axes=("B", "N"))
    with _full_precision(image_features.device):
        kernel = _cosine_kernel(image_features.float(), token_mask)
        entropy = _spectral_entropy(kernel, token_mask, image_features.shape[2])
        entropy = entropy + _zero_if_finite(saliency, token_mask)
        count = saliency_count(saliency_ratio(entropy, config), keep_tokens)
        salient = _saliency_stage(saliency.float(), token_mask, keep_tokens)
        covering = _second_stage(kernel, token_mask, salient, count, config)
    indices, mask = _slots(salient, covering, count, config)
    features = image_features.gather(1, indices[:, :, None].expand(-1, -1, image_features.shape[2]))
    return PrunedTokens(features, indices, mask, count, entropy)


def coverage_picks(kernel: Tensor, loss: Tensor, count: Tensor, keep_tokens: int) -> Tensor:
    """Greedy MAP of a determinantal point process, T - T_sal picks per image.

    Args:
        kernel: cosine similarities ``[B, N, N]`` float32; rows of zero vectors and padding are 0.
        loss: ``[B, N]`` float32, 1 - d^2 of each token before any pick: 0 for a token to pick from, just below 0
            for the one to pick first, 1 for a zero vector, 2 for padding, 1e30 for a token already taken.
        count: ``[B]`` int64, T_sal; image b needs T - T_sal picks.
        keep_tokens: the budget T.

    Returns:
        ``[B, T]`` int64; the first T - T_sal entries of each row are the picks, the rest is undefined.
    """
    if kernel.is_cuda and _has_triton():
        from promprune.method.triton_kernel import fused_coverage_picks

        return fused_coverage_picks(kernel, loss, count, keep_tokens)
    return _coverage_loop(kernel, loss, keep_tokens)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No TF32 and no autocast: the selection needs all 24 bits of float32."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision  # the older allow_tf32 cannot be read once this one has been set
    products.fp32_precision = "ieee"
    autocast = torch.amp.is_autocast_available(device.type)
    try:
        with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            yield
    finally:
        products.fp32_precision = before


def _both(mask: Tensor) -> Tensor:
    return mask[:, :, None] & mask[:, None, :]


def _cosine_kernel(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """Cosine similarity of every two tokens, [B, N, N]; 0 for zero vectors and padding."""
    gram = x @ x.mT
    if token_mask is not None:
        gram = torch.where(_both(token_mask), gram, 0.0)
    squared = gram.diagonal(dim1=1, dim2=2)
    inverse = torch.where(squared < NORM_FLOOR**2, 0.0, squared.rsqrt())
    return gram * inverse[:, :, None] * inverse[:, None, :]


def _spectral_entropy(kernel: Tensor, token_mask: Tensor | None, hidden_size: int) -> Tensor:
    """Normalised spectral entropy of each image, [B]; the formula is that of promprune.method.entropy_table."""
    n = kernel.shape[1]
    tokens = kernel.new_full((), n) if token_mask is None else token_mask.sum(1).float()
    per_token = tokens.clamp_min(1).reshape(-1, 1, 1)
    mean = kernel.sum(2, keepdim=True) / per_token
    centred = kernel - mean - (mean - mean.sum(1, keepdim=True) / per_token).mT
    if token_mask is not None:
        centred = torch.where(_both(token_mask), centred, 0.0)
    trace = centred.diagonal(dim1=1, dim2=2).sum(1)
    norm = centred.square().sum(2).sum(1).sqrt()
    products = _inner_products(centred * (ENTROPY_TABLE.multiplier**2 / 4 / norm)[:, None, None])
    share = norm / trace
    total = share * products + share.log() + ENTROPY_TABLE.linear
    entropy = -total / tokens.clamp(2, max(hidden_size, 2)).log()
    return torch.where(norm <= tokens * BLANK_NORM, 1.0, entropy)


def _inner_products(first: Tensor) -> Tensor:
    """sum over (i, j) of c_ij <V_i, V_j>, [B], from V_0 [B, N, N]."""
    chain = [first]
    for _ in range(ENTROPY_TABLE.products):
        v = chain[-1]
        chain.append(torch.baddbmm(v, v, v, beta=ENTROPY_TABLE.multiplier, alpha=-1))
    stack = torch.stack(chain, dim=2)
    products = (stack @ stack.mT).sum(1)
    return (products * _coefficients(first.device)).sum((1, 2))


@cache
def _coefficients(device: torch.device) -> Tensor:
    size = ENTROPY_TABLE.products + 1
    coefficients = torch.zeros(size, size)
    for i, j, c in ENTROPY_TABLE.pairs:
        coefficients[i, j] = c
    return coefficients.to(device)


def _zero_if_finite(saliency: Tensor, token_mask: Tensor | None) -> Tensor:
    """0, or NaN if the saliency of an image is not finite, [B]."""
    real = saliency if token_mask is None else torch.where(token_mask, saliency, 0.0)
    return real.float().sum(1) * 0


def _saliency_stage(saliency: Tensor, token_mask: Tensor | None, keep_tokens: int) -> Tensor:
    """The T most salient tokens, most salient first, [B, T]; last come tokens with NaN saliency, then padding."""
    score = torch.where(saliency.isnan(), -1.5e38, saliency)
    if token_mask is not None:
        score = torch.where(token_mask, score, -3e38)
    # Not topk: it breaks ties in an unspecified order.
    return score.sort(dim=1, descending=True, stable=True).indices[:, :keep_tokens]


def _second_stage(
    kernel: Tensor, token_mask: Tensor | None, salient: Tensor, count: Tensor, config: SelectionConfig
) -> Tensor:
    """The tokens of the stage after saliency, [B, T]; the first T - T_sal of them are kept."""
    keep_tokens = salient.shape[1]
    if config.policy == "saliency":
        return salient  # not used: T_sal = T
    if config.policy == "random":
        return _random_stage(kernel, token_mask, keep_tokens)
    return coverage_picks(kernel, _initial_loss(kernel, token_mask, salient, count), count, keep_tokens)


def _random_stage(kernel: Tensor, token_mask: Tensor | None, keep_tokens: int) -> Tensor:
    """The first T tokens of ``random_order``, padding last, [B, T]."""
    batch, n = kernel.shape[:2]
    place = random_order(n).argsort().to(kernel.device).expand(batch, n)
    if token_mask is not None:
        place = torch.where(token_mask, place, n)
    return place.sort(dim=1, stable=True).indices[:, :keep_tokens]


def _initial_loss(kernel: Tensor, token_mask: Tensor | None, salient: Tensor, count: Tensor) -> Tensor:
    """The loss that coverage_picks starts from, [B, N]."""
    loss = (kernel.diagonal(dim1=1, dim2=2) == 0).float()
    if token_mask is not None:
        loss = torch.where(token_mask, loss, 2.0)
    in_saliency = torch.arange(salient.shape[1], device=salient.device) < count[:, None]
    loss = loss.scatter_add(1, salient, in_saliency.float() * TAKEN)
    overlap = torch.where((loss > TAKEN / 2)[:, None, :], kernel, -2.0).amax(2)
    first = (overlap + 3 * loss).argmin(dim=1, keepdim=True)
    return loss.scatter(1, first, -_TINY)


def _coverage_loop(kernel: Tensor, loss: Tensor, keep_tokens: int) -> Tensor:
    batch, n = loss.shape
    coordinates = kernel.new_zeros(batch, keep_tokens, n)
    picks = []
    for t in range(keep_tokens):
        key = torch.where(loss > 1 - RESIDUAL_FLOOR, loss.round(), loss)
        pick = key.argmin(dim=1, keepdim=True)
        least = key.gather(1, pick)
        # If all tokens are spanned, the new direction is rounding noise, and dividing by a large number removes it.
        residual = torch.where(least < 1, 1 - least, TAKEN)
        row = pick[:, :, None].expand(-1, 1, n)
        own = coordinates[:, :t].gather(2, pick[:, None, :].expand(-1, t, 1))
        new = (kernel.gather(1, row) - own.mT @ coordinates[:, :t]).squeeze(1) / residual.sqrt()
        coordinates[:, t] = new
        loss = (loss + new.square()).scatter(1, pick, TAKEN)
        picks.append(pick)
    return torch.cat(picks, dim=1)


def _slots(salient: Tensor, covering: Tensor, count: Tensor, config: SelectionConfig) -> tuple[Tensor, Tensor]:
    """Indices and their stage, [B, T] each: entry t is salient[t] if t < T_sal, else covering[t - T_sal]."""
    slot = torch.arange(salient.shape[1], device=salient.device).expand_as(salient)
    mask = slot < count[:, None]
    indices = torch.where(mask, salient, covering.gather(1, (slot - count[:, None]).clamp_min(0)))
    if config.order == "selection":
        return indices, mask
    indices, order = indices.sort(dim=1)
    return indices, mask.gather(1, order)
