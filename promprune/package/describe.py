"""Describing a package in words."""

from __future__ import annotations

from promprune.package.manifest import Manifest, WeightRecord

__all__ = ["describe_selection", "describe_weights"]


def describe_selection(manifest: Manifest) -> str:
    """Describe in words which share of the tokens is kept and removed."""
    tokens = manifest.tokens_of()
    where = "of each crop " if manifest.image.layout.max_crops > 1 else ""
    if not tokens.is_pruned:
        return f"keeps all {tokens.num_tokens} visual tokens {where}(the unpruned baseline)"
    kept = (
        f"keeps {tokens.keep_tokens} of {tokens.num_tokens} visual tokens {where}"
        f"({tokens.ratio:.1%}), removes {1 - tokens.ratio:.1%}"
    )
    sizes = [f"{rows}x{columns}" for rows, columns in manifest.image.layout.grid_sizes]
    if len(sizes) <= 1:
        return kept
    first, *others = sizes
    return f"{kept}, in images of {first} tokens; also takes images of {', '.join(others)}"


def describe_weights(manifest: Manifest) -> str:
    """Say in which formats activations and weights are, such as ``"fp32, weights int4/32 (vision int8)"``."""
    weights = manifest.weights
    if weights is None or {weights.language.format, weights.vision.format} == {manifest.dtype}:
        return manifest.dtype
    language, vision = (_describe_weight(record) for record in (weights.language, weights.vision))
    if not manifest.has_language_model or language == vision:
        return f"{manifest.dtype}, weights {vision}"
    return f"{manifest.dtype}, weights {language} (vision {vision})"


def _describe_weight(record: WeightRecord) -> str:
    blocks = "" if record.block_size is None else f"/{record.block_size}"
    return f"{record.format}{blocks}{' with int8 activations' if record.int8_activations else ''}"
