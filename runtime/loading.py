"""Loading the graphs of a package, and checking that they fit each other and the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from promprune.errors import PackageError
from promprune.package import DECODER, EMBED_TOKENS, VISION_ENCODER, Manifest
from promprune.runtime.config import RuntimeConfig
from promprune.runtime.sessions import Session, SessionOptions, open_session

__all__ = ["open_sessions"]

_VISION_OUTPUTS: Final = frozenset(
    {"image_features", "token_indices", "saliency_mask", "saliency_count", "spectral_entropy"}
)


def open_sessions(folder: Path, manifest: Manifest, config: RuntimeConfig) -> dict[str, Session]:
    """Load the three graphs of a package, by their names in the manifest.

    Raises:
        PackageError: a graph is not what the manifest says, or they do not fit each other.
        BackendError: a graph, or the provider that was asked for, cannot be loaded.
    """
    options = SessionOptions(provider=config.provider, num_threads=config.num_threads)
    lookup = replace(options, num_threads=1)  # one Gather: threads of its own would only get in the decoder's way
    sessions: dict[str, Session] = {}
    for name in (VISION_ENCODER, EMBED_TOKENS, DECODER):
        record = manifest.graphs[name]
        sessions[name] = open_session(folder / record.file, lookup if name == EMBED_TOKENS else options)
        sessions[name].check_against(record, folder / record.file)
    _check_consistent(manifest, sessions)
    return sessions


def _check_consistent(manifest: Manifest, sessions: Mapping[str, Session]) -> None:
    """Check that the graphs fit each other and the manifest's numbers; the rest is checked where it is used.

    Raises:
        PackageError: they do not.
    """
    selection, image = manifest.selection, manifest.image
    vision, embed, decoder = (sessions[name] for name in (VISION_ENCODER, EMBED_TOKENS, DECODER))
    embeds = decoder.inputs.get("inputs_embeds")
    hidden = embeds.shape[-1] if embeds else None
    outputs = {"image_features"} if selection.keep_tokens == selection.num_tokens else _VISION_OUTPUTS
    pairs: dict[str, tuple[object, object]] = {
        "inputs of the vision encoder": ({*vision.inputs}, {"pixel_values"}),
        "outputs of the vision encoder": ({*vision.outputs}, outputs),
        "inputs and outputs of embed_tokens": ({*embed.inputs, *embed.outputs}, {"input_ids", "inputs_embeds"}),
        "patches": (image.patch_rows * image.patch_columns, selection.num_tokens),
    }
    if all(found == expected for found, expected in pairs.values()):
        pixels, features = vision.inputs["pixel_values"].shape, vision.outputs["image_features"].shape
        pairs = {
            "pixel_values": (pixels[1:], (3, image.height, image.width)),
            "image_features": (features[1:], (selection.keep_tokens, hidden)),
            "inputs_embeds": (embed.outputs["inputs_embeds"].shape[2:], (hidden,)),
        }
    for what, (found, expected) in pairs.items():
        if found != expected:
            raise PackageError(
                f"the package's {what} are {_shown(found)}", expected=f"{_shown(expected)}", fix="export again"
            )


def _shown(value: object) -> str:
    return ", ".join(map(str, sorted(value))) if isinstance(value, set) else str(value)
