"""Synthetic projector outputs of several kinds, for tests and benchmarks; seeded, so a run can be repeated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def power_law(rng: np.random.Generator, n: int, d: int) -> Array:
    """Tokens whose covariance spectrum falls like a power, around a common mean."""
    rank = min(n, d, 256)
    basis = rng.standard_normal((rank, d)) / np.sqrt(d)
    scale = np.arange(1, rank + 1) ** -rng.uniform(0.5, 1.3)
    return _finish(rng, rng.standard_normal((n, rank)) * scale @ basis, common=rng.uniform(0, 0.5))


def clusters(rng: np.random.Generator, n: int, d: int) -> Array:
    """A few objects, each with its own direction and spread, of very different sizes."""
    k = int(rng.integers(3, 20))
    centres = rng.standard_normal((k, d)) / np.sqrt(d)
    weights = rng.dirichlet(np.full(k, 0.6))
    noise = rng.standard_normal((n, d)) / np.sqrt(d) * rng.uniform(0.2, 0.6)
    return _finish(rng, centres[rng.choice(k, n, p=weights)] + noise, common=rng.uniform(0, 0.3))


def smooth(rng: np.random.Generator, n: int, d: int) -> Array:
    """A field that varies slowly over the image plane, plus a little noise."""
    side = int(np.ceil(np.sqrt(n)))
    y, x = np.divmod(np.arange(n), side)
    frequencies = rng.standard_normal((2, 64)) * rng.uniform(0.5, 1.5) / side
    waves = np.cos(np.stack([y, x], 1) @ frequencies * 2 * np.pi + rng.uniform(0, 6.3, 64))
    noise = rng.standard_normal((n, d)) / np.sqrt(d) * rng.uniform(0.05, 0.5)
    return _finish(rng, waves @ rng.standard_normal((64, d)) / np.sqrt(32 * d) + noise, common=rng.uniform(0, 0.4))


def patterned(rng: np.random.Generator, n: int, d: int) -> Array:
    """Repeated texture: a small dictionary tiled over the image, with jitter."""
    period = int(rng.integers(4, 24))
    tiles = rng.standard_normal((period, d)) / np.sqrt(d)
    jitter = rng.standard_normal((n, d)) / np.sqrt(d) * rng.uniform(0.15, 0.5)
    return _finish(rng, tiles[np.arange(n) * int(rng.integers(1, 7)) % period] + jitter, common=rng.uniform(0, 0.3))


def mixed(rng: np.random.Generator, n: int, d: int) -> Array:
    """Half of the image one kind, half another."""
    first, second = rng.choice(4, 2, replace=False)
    kinds = (power_law, clusters, smooth, patterned)
    half = rng.random(n) < rng.uniform(0.3, 0.7)
    return np.where(half[:, None], kinds[first](rng, n, d), kinds[second](rng, n, d))


KINDS: dict[str, Callable[[np.random.Generator, int, int], Array]] = {
    "power law": power_law,
    "clusters": clusters,
    "smooth": smooth,
    "patterned": patterned,
    "mixed": mixed,
}


def saliency(rng: np.random.Generator, n: int) -> Array:
    """CLS-attention-like scores: positive, heavy-tailed, summing to 1."""
    raw = rng.standard_normal(n) * rng.uniform(0.5, 2)
    return (np.exp(raw) / np.exp(raw).sum()).astype(np.float32)


def feature_set(index: int, n: int, d: int) -> tuple[str, Array, Array]:
    """The ``index``-th set: its kind, features ``[n, d]`` and saliency ``[n]``; kinds take turns."""
    rng = np.random.default_rng([index, n, d])
    kind = list(KINDS)[index % len(KINDS)]
    return kind, KINDS[kind](rng, n, d), saliency(rng, n)


def _finish(rng: np.random.Generator, x: NDArray[np.float64], common: float) -> Array:
    """Add a direction that all tokens share and a spread of lengths, as a projector does."""
    shared = rng.standard_normal(x.shape[1])
    x = x / np.sqrt((x**2).sum(1).mean()) + common * shared / np.linalg.norm(shared)
    return (x * rng.lognormal(0, 0.3, (len(x), 1)) * 10).astype(np.float32)


def to_tf32(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round to the 10 bits of mantissa that TF32 multiplies with."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & np.uint32(0xFFFFE000)).view(np.float32)
