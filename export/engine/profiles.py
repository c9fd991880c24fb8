"""The ranges of shapes that an engine accepts, and the shapes it is tuned for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from promprune.errors import PackageError
from promprune.package.engines import EngineConfig, ProfileRecord, ShapeRange
from promprune.package.manifest import DECODER, EMBED_TOKENS, GraphRecord, Manifest

__all__ = ["profiles_of"]

# Engines are tuned for prompts with this many tokens besides those of one image.
TYPICAL_PROMPT_TOKENS: Final = 64


def profiles_of(name: str, manifest: Manifest, config: EngineConfig) -> tuple[ProfileRecord, ...]:
    """Return the optimisation profiles of one graph.

    One profile accepts every length. With ``config.decode_profile`` the decoder has two: ``prefill`` for prompts (also
    those that continue a KV cache), and ``decode`` for one token per batch row. All are tuned for one image and a
    prompt of ``TYPICAL_PROMPT_TOKENS``; an image with several crops is a batch of crops.

    Raises:
        PackageError: the graph has a dynamic dimension with an unknown name.
    """
    graph, context = manifest.graphs[name], manifest.context_length
    longest = min(manifest.max_image_tokens + config.max_prompt_tokens, context)
    total = min(longest + config.max_new_tokens, context)
    typical = min(manifest.max_image_tokens + TYPICAL_PROMPT_TOKENS, longest)
    crops = 1 if name in (EMBED_TOKENS, DECODER) else manifest.image.layout.max_crops
    batch = {"batch_size": (1, crops, crops * config.max_batch)}
    lengths = {
        "prefill": {
            "sequence_length": (1, typical, longest),
            "past_sequence_length": (0, 0, total - 1),
            "total_sequence_length": (1, typical, total),
        },
        "decode": {
            "sequence_length": (1, 1, 1),
            "past_sequence_length": (1, min(typical, total - 1), total - 1),
            "total_sequence_length": (2, min(typical + 1, total), total),
        },
    }
    if name == DECODER and config.decode_profile:
        return tuple(_profile(phase, graph, {**batch, **sizes}) for phase, sizes in lengths.items())
    return (_profile("any", graph, {**batch, **lengths["prefill"]}),)


def _profile(phase: str, graph: GraphRecord, sizes: Mapping[str, tuple[int, int, int]]) -> ProfileRecord:
    shapes = {}
    for tensor in graph.inputs:
        for dim in tensor.shape:
            if isinstance(dim, str) and dim not in sizes:
                raise PackageError(
                    f"{graph.file} has the dynamic dimension {dim!r} in {tensor.name}",
                    expected=f"one of {', '.join(sizes)}",
                    fix="export the package again",
                )
        low, typical, high = (
            tuple(sizes[dim][i] if isinstance(dim, str) else dim for dim in tensor.shape) for i in range(3)
        )
        shapes[tensor.name] = ShapeRange(min=low, opt=typical, max=high)
    return ProfileRecord(name=phase, shapes=shapes)
