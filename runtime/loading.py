"""Loading the graphs of a package, and checking that they fit each other and the manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from promprune.errors import PackageError
from promprune.package import DECODER, EMBED_TOKENS, VISION_ENCODER, Manifest
from promprune.runtime.config import RuntimeConfig
from promprune.runtime.sessions import Session, SessionOptions, open_session

__all__ = ["open_language_model", "open_vision_encoder"]

_VISION_OUTPUTS: Final = frozenset(
    {"image_features", "token_indices", "saliency_mask", "saliency_count", "spectral_entropy"}
)


def open_vision_encoder(folder: Path, manifest: Manifest, config: RuntimeConfig) -> Session:
    """Load the vision encoder.

    Raises:
        PackageError: it is not what the manifest says.
        BackendError: it, or the provider that was asked for, cannot be loaded.
    """
    session = _open(folder, manifest, VISION_ENCODER, config)
    selection, image = manifest.selection, manifest.image
    pruned = selection.keep_tokens != selection.num_tokens
    _expect("the vision encoder's inputs", {*session.inputs}, {"pixel_values"})
    _expect("the vision encoder's outputs", {*session.outputs}, _VISION_OUTPUTS if pruned else {"image_features"})
    _expect("pixel_values", session.inputs["pixel_values"].shape[1:], (3, image.height, image.width))
    _expect("image_features", session.outputs["image_features"].shape[1:2], (selection.keep_tokens,))
    _expect("patches", image.patch_rows * image.patch_columns, selection.num_tokens)
    return session


def open_language_model(folder: Path, manifest: Manifest, config: RuntimeConfig) -> tuple[Session, Session]:
    """Load ``embed_tokens`` and the decoder; what the decoder needs is checked where it is run.

    Raises:
        PackageError: they are not what the manifest says, or do not fit each other.
        BackendError: one of them, or the provider that was asked for, cannot be loaded.
    """
    if not manifest.has_language_model:
        raise PackageError(
            f"{folder} has no language model: it was exported with --vision-only",
            expected="a package with a language model",
            fix="use ImageEncoder for its visual tokens, or export without --vision-only",
        )
    # One Gather: threads of its own would only get in the decoder's way.
    embed = _open(folder, manifest, EMBED_TOKENS, replace(config, num_threads=1))
    decoder = _open(folder, manifest, DECODER, config)
    _expect("embed_tokens' inputs", {*embed.inputs}, {"input_ids"})
    _expect("embed_tokens' outputs", {*embed.outputs}, {"inputs_embeds"})
    if "inputs_embeds" in decoder.inputs:
        hidden = decoder.inputs["inputs_embeds"].shape[-1]
        _expect("embed_tokens' size", embed.outputs["inputs_embeds"].shape[-1], hidden)
    return embed, decoder


def _open(folder: Path, manifest: Manifest, name: str, config: RuntimeConfig) -> Session:
    record = manifest.graphs[name]
    options = SessionOptions(provider=config.provider, num_threads=config.num_threads)
    session = open_session(folder / record.file, options, backend=config.backend)
    session.check_against(record, folder / record.file)
    return session


def _expect(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise PackageError(f"{what}: {_shown(found)}", expected=_shown(expected), fix="export the package again")


def _shown(value: object) -> str:
    return ", ".join(sorted(map(str, value))) if isinstance(value, (set, frozenset)) else str(value)
