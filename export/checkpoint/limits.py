"""Limits of a checkpoint's configuration, checked before any module is built from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from promprune.errors import ModelError, UnsupportedModelError

__all__ = ["MAX_CONFIG_BYTES", "check_config"]

MAX_CONFIG_BYTES: Final = 4 * 1024 * 1024
_MAX_DEPTH: Final = 8  # of nested configurations

# Key -> smallest and largest value, far beyond published models; other types than numbers are left to transformers.
_WIDTH: Final = (1, 262_144)
_HEADS: Final = (1, 1024)
_LAYERS: Final = (1, 1024)
_TOKEN: Final = (-1, 4_000_000)
_LIMITS: Final[Mapping[str, tuple[int, int]]] = {
    "num_hidden_layers": _LAYERS,
    "depth": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "num_heads": _HEADS,
    "head_dim": (1, 8192),
    "hidden_size": _WIDTH,
    "embed_dim": _WIDTH,
    "intermediate_size": _WIDTH,
    "out_hidden_size": _WIDTH,
    "projection_dim": _WIDTH,
    "vocab_size": (1, 4_000_000),
    "max_position_embeddings": (1, 100_000_000),
    "image_size": (1, 8192),
    "patch_size": (1, 1024),
    "spatial_patch_size": (1, 1024),
    "temporal_patch_size": (1, 64),
    "spatial_merge_size": (1, 64),
    "window_size": (1, 8192),
    "num_channels": (1, 16),
    "in_channels": (1, 16),
    "image_seq_length": (1, 1_000_000),
    "pad_token_id": _TOKEN,
    "bos_token_id": _TOKEN,
    "eos_token_id": _TOKEN,
    "image_token_id": (-4_000_000, 4_000_000),
    "image_token_index": (-4_000_000, 4_000_000),
}


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse the configuration of a model that could not be built, or only with a very large amount of memory or time.

    Args:
        config: the content of ``config.json``.
        path: the file, for messages.

    Raises:
        ModelError: a value is out of its range.
        UnsupportedModelError: a part of the model has a quantization of its own.
    """
    for name, section in _sections(config, ""):
        if name and "quantization_config" in section:
            raise UnsupportedModelError(
                f"{path} has a quantization_config in {name}", expected="one for the entire model, or none"
            )
        for key, (least, most) in _LIMITS.items():
            value = section.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not least <= value <= most:
                where = f"{name}.{key}" if name else key
                raise ModelError(f"{path} has {where} = {str(value)[:40]}", expected=f"{least} to {most}")


def _sections(config: Mapping[str, Any], name: str, depth: int = 0) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a configuration and those inside it, with their names."""
    yield name, config
    for key, value in config.items():
        if isinstance(value, dict) and depth < _MAX_DEPTH:
            yield from _sections(value, f"{name}.{key}" if name else str(key)[:100], depth + 1)
