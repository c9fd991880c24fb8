"""Loading the language model of a package, and checking that its graphs fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from promprune.errors import BackendError, PackageError
from promprune.package.lowered import LOWERED_BACKEND
from promprune.package.manifest import DECODER, EMBED_TOKENS, VISION_ENCODER, Manifest, TensorRecord
from promprune.package.package import Package
from promprune.runtime.engine.decoder import Decoder
from promprune.runtime.engine.language_model import LanguageModel
from promprune.runtime.engine.prompt import read_json
from promprune.runtime.images.base import expect
from promprune.runtime.sessions import Session, open_session
from promprune.runtime.sessions.config import RuntimeConfig

__all__ = ["expect_same_width", "open_language_model", "same_language_model", "steps_in_place"]


def open_language_model(package: Package, config: RuntimeConfig) -> LanguageModel:
    """Load ``embed_tokens`` and the decoder.

    Raises:
        PackageError: a graph differs from the manifest, or the graphs do not fit together.
        BackendError: a graph, or the requested provider, cannot be loaded.
    """
    if not package.manifest.has_language_model:
        raise PackageError(
            f"{package.folder} has no language model: it was exported with --vision-only",
            expected="a package with a language model",
            fix="use ImageEncoder for its visual tokens, or export without --vision-only",
        )
    # One Gather: more threads would only compete with the decoder's.
    embed = open_session(package, EMBED_TOKENS, replace(config, num_threads=1))
    decoder = open_decoder(package, config, embed.device)
    expect("embed_tokens' inputs", {*embed.inputs}, {"input_ids"})
    expect("embed_tokens' outputs", {*embed.outputs}, {"inputs_embeds"})
    if "inputs_embeds" in decoder.inputs:
        made, wanted = embed.outputs["inputs_embeds"], decoder.inputs["inputs_embeds"]
        expect("embed_tokens' size", made.shape[-1], wanted.shape[-1])
        expect("embed_tokens' dtype", made.dtype, wanted.dtype)
    return LanguageModel(
        embed, Decoder(decoder, config.prefill_chunk, in_place=steps_in_place(package.folder, decoder))
    )


def open_decoder(package: Package, config: RuntimeConfig, device: str) -> Session:
    """Load the lowered decoder if there is one that can be used on the device, else the portable one; say which."""
    reason = f"{config.backend} on {device} runs the portable one" if config.lowered else "not asked for"
    if config.lowered and config.backend == LOWERED_BACKEND and device == "CPU":
        from promprune.runtime.sessions.onnxruntime import open_lowered_decoder

        try:
            lowered = open_lowered_decoder(package, config)
        except (BackendError, PackageError) as error:
            reason = str(error)
        else:
            if lowered is not None:
                lowered.notes += ("decoder lowered for ONNX Runtime: keys and values are updated in place",)
                return lowered
            reason = "the package has none"
    decoder = open_session(package, DECODER, config)
    decoder.notes += (f"no lowered decoder: {reason}",)
    return decoder


def expect_same_width(manifest: Manifest) -> None:
    """Compare the size of the visual tokens with that of the language model's embeddings in the manifest.

    Every graph is compared with the manifest when it is opened.

    Raises:
        PackageError: they differ.
    """
    decoder = manifest.graphs.get(DECODER)
    wanted = _width(decoder.inputs, "inputs_embeds") if decoder else None
    for name, graph in manifest.graphs.items():
        if wanted is not None and name.startswith(VISION_ENCODER):
            expect(f"size of the visual tokens of {name}", _width(graph.outputs, "image_features"), wanted)


def _width(tensors: Sequence[TensorRecord], name: str) -> int | str | None:
    """Return the last dimension of a tensor; None if there is no such tensor, or it has no dimensions."""
    return next((tensor.shape[-1] for tensor in tensors if tensor.name == name and tensor.shape), None)


def steps_in_place(folder: Path, decoder: Session) -> bool:
    """Return whether decode steps run in place: if the session replays them, and attention has no sliding window."""
    windowed = decoder.repeats and _has_window(read_json(folder / "config.json"))
    if windowed:
        decoder.notes += (f"{decoder.name} steps without CUDA graphs: its attention has a sliding window",)
    return decoder.repeats and not windowed


def _has_window(config: Mapping[str, Any]) -> bool:
    """Return whether a model configuration restricts attention to the latest tokens."""
    text = config.get("text_config", config)
    if layers := text.get("layer_types"):
        return "sliding_attention" in layers
    return text.get("sliding_window") is not None and text.get("use_sliding_window") is not False


def same_language_model(a: Manifest, b: Manifest) -> bool:
    """Return whether two packages have the same language model, byte for byte."""
    return a.has_language_model and b.has_language_model and _language_files(a) == _language_files(b)


def _language_files(manifest: Manifest) -> set[tuple[str, str]]:
    graphs = [manifest.graphs[name] for name in (EMBED_TOKENS, DECODER)]
    wanted = {file for graph in graphs for file in (graph.file, *graph.weights)}
    return {(record.path, record.sha256) for record in manifest.files if record.path in wanted}
