"""The export, whole: from a checkpoint to a verified package."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import onnx_ir as ir

from promprune._version import __version__
from promprune.dtypes import BY_NAME
from promprune.errors import VerificationError
from promprune.export.checkpoint.loading import Checkpoint, load_checkpoint, read_constants
from promprune.export.checkpoint.meta_model import make_fake
from promprune.export.checkpoint.prompts import chat_template
from promprune.export.checkpoint.weights import torch_dtype
from promprune.export.config import ExportConfig, default_output
from promprune.export.families import AdaptedModel, VisionGraph
from promprune.export.graphs.decoder import decoder_graph, embed_tokens_graph
from promprune.export.graphs.external_data import Placement, link_weights
from promprune.export.graphs.selector import build_selector
from promprune.export.graphs.trace import graph_record, save_graph
from promprune.export.graphs.vision import drop_saliency, fuse_selector, vision_graph
from promprune.export.verify.verification import verify_package
from promprune.package.image import CropLayout, ImageRecord
from promprune.package.manifest import (
    CHAT_TEMPLATE_FILE,
    DECODER,
    EMBED_TOKENS,
    SCHEMA_VERSION,
    TOKEN_SELECTOR,
    VISION_ENCODER,
    GraphRecord,
    Manifest,
    SelectionRecord,
    TokenCounts,
    file_records,
    write_manifest,
    writing_package,
)
from promprune.progress import NO_PROGRESS, Progress

__all__ = ["ExportResult", "default_output", "export_package"]

ROUNDING: Final = "ratio x num_tokens rounded half to even, at least 1"


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """A package that was written.

    Attributes:
        output: its folder.
        manifest: as written.
        seconds: wall time of the whole export.
    """

    output: Path
    manifest: Manifest
    seconds: float


def export_package(config: ExportConfig, *, progress: Progress = NO_PROGRESS) -> ExportResult:
    """Export a model with its selection, verify the package, and let it appear by one rename.

    Raises:
        PrompruneError: one of its subclasses, when something is refused or fails; nothing is left behind then.
    """
    started = time.perf_counter()
    output = config.output or default_output(config)
    with writing_package(output, force=config.force) as folder:
        progress.announce(2 + config.verify)
        with progress.step("read the checkpoint"):
            checkpoint = load_checkpoint(config.model, dtype=torch_dtype(config.dtype))
            make_fake(checkpoint.skeleton)
            model = checkpoint.family.adapted(checkpoint.skeleton, checkpoint.processor, config.image_grids)
            selection = selection_record(config, checkpoint)
            counts = token_counts(config, model)
        placement = start_placement(folder, config, checkpoint)
        graphs = write_graphs(placement, config, model, selection, counts, progress)
        with progress.step("write tokenizer and configuration"):
            write_configs(folder, checkpoint, model, counts[VISION_ENCODER])
            write_arrays(folder, config, checkpoint, model)
            manifest = build_manifest(folder, config, checkpoint, model, selection, graphs, placement)
            write_manifest(folder, manifest)
        if config.verify:
            with progress.step("verify against the model"):
                verification = verify_package(folder, manifest, checkpoint)
            if not verification.passed:
                raise VerificationError("the package disagrees with the model", checks=verification.checks)
            manifest = msgspec.structs.replace(manifest, verification=verification)
            write_manifest(folder, manifest)
    return ExportResult(output=output, manifest=manifest, seconds=time.perf_counter() - started)


def selection_record(config: ExportConfig, checkpoint: Checkpoint) -> SelectionRecord:
    """Settle the parameters of the selection, as the manifest records them."""
    own = read_constants(checkpoint.folder)
    return SelectionRecord(
        config=config.selection(own),
        parameters_from=config.parameters_from(own),
        loop=config.loop,
        requested_ratio=config.ratio if config.keep_tokens is None else None,
        rounding=ROUNDING,
    )


def token_counts(config: ExportConfig, model: AdaptedModel) -> dict[str, TokenCounts]:
    """Settle N and T of every vision graph.

    Raises:
        ConfigError: T is larger than N.
    """
    return {
        vision.name: TokenCounts(num_tokens=vision.num_tokens, keep_tokens=config.keep_tokens_of(vision.num_tokens))
        for vision in model.vision_graphs
    }


def start_placement(folder: Path, config: ExportConfig, checkpoint: Checkpoint) -> Placement:
    """Make ``folder/onnx`` and link the checkpoint's weights into it, as far as they are to be linked."""
    onnx = folder / "onnx"
    onnx.mkdir()
    links = link_weights(tuple(checkpoint.digests), onnx, copy=config.copy_weights)
    known = {onnx / name: checkpoint.digests[file] for file, name in links.items()}
    must_link = config.copy_weights is False
    return Placement(folder=onnx, links=links, must_link=must_link, digests=known)


def write_graphs(
    placement: Placement,
    config: ExportConfig,
    model: AdaptedModel,
    selection: SelectionRecord,
    counts: Mapping[str, TokenCounts],
    progress: Progress,
) -> dict[str, GraphRecord]:
    """Export every graph, and return their records by name."""
    makers: dict[str, Callable[[], ir.Model]] = {
        vision.name: partial(vision_with_selection, config, model, vision, selection, counts[vision.name])
        for vision in model.vision_graphs
    }
    if not config.vision_only:
        makers[EMBED_TOKENS] = lambda: embed_tokens_graph(model, opset=config.opset)
        makers[DECODER] = lambda: decoder_graph(model, opset=config.opset)
    if config.split_selector:
        makers[TOKEN_SELECTOR] = lambda: selector(
            config, model, model.vision_graphs[0], selection, counts[VISION_ENCODER]
        )
    records = {}
    progress.announce(len(makers))
    for name, make in makers.items():
        with progress.step(f"export {name}"):
            graph = make()
            share = name.startswith(VISION_ENCODER)  # the graphs of several grids have the same weights
            weights = save_graph(graph, placement.folder / f"{name}.onnx", placement, share=share)
            records[name] = graph_record(graph, f"onnx/{name}.onnx", weights, counts.get(name))
    placement.remove_unused()
    return records


def vision_with_selection(
    config: ExportConfig, model: AdaptedModel, vision: VisionGraph, selection: SelectionRecord, counts: TokenCounts
) -> ir.Model:
    """Export a vision encoder with the selection inside; with nothing to remove, without it."""
    graph = vision_graph(vision, opset=config.opset)
    if not counts.is_pruned:
        return drop_saliency(graph)
    return fuse_selector(graph, selector(config, model, vision, selection, counts))


def selector(
    config: ExportConfig, model: AdaptedModel, vision: VisionGraph, selection: SelectionRecord, counts: TokenCounts
) -> ir.Model:
    """Author the selection for one vision graph."""
    proto = build_selector(
        counts.num_tokens,
        model.text_config.hidden_size,
        counts.keep_tokens,
        selection.config,
        batch_size="batch_size" if vision.is_batched else 1,
        token_mask=vision.token_mask,
        dtype=BY_NAME[config.dtype].numpy,
        loop=selection.loop,
        opset=config.opset,
    )
    return ir.from_proto(proto)


def write_arrays(folder: Path, config: ExportConfig, checkpoint: Checkpoint, model: AdaptedModel) -> None:
    """Write what the runtime's layout reads besides the graphs; small weights, read for this."""
    if not model.arrays:
        return
    real = checkpoint.family.adapted(checkpoint.streamed_model(), checkpoint.processor, config.image_grids)
    for name, array in real.arrays.items():
        np.save(folder / name, array.detach().numpy())


def write_configs(folder: Path, checkpoint: Checkpoint, model: AdaptedModel, counts: TokenCounts) -> None:
    """Write tokenizer, chat template, preprocessing and model configuration, as other clients expect them."""
    processor, source = checkpoint.processor, checkpoint.skeleton
    template = chat_template(processor)
    processor.tokenizer.chat_template = template
    processor.tokenizer.save_pretrained(folder, save_jinja_files=False)  # transformers.js reads no others
    if isinstance(template, str):
        (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
    preprocessor = processor.image_processor.to_dict()
    preprocessor["image_processor_type"] = preprocessor["image_processor_type"].removesuffix("Pil").removesuffix("Fast")
    if isinstance(model.layout, CropLayout):
        preprocessor.setdefault("do_center_crop", False)  # SigLIP's does not say it, other readers take it for true
        preprocessor["processor_class"] = type(processor).__name__
        _write_json(folder / "processor_config.json", _placeholders(checkpoint, model, model.layout, counts))
    _write_json(folder / "preprocessor_config.json", preprocessor)
    (folder / "config.json").write_text(source.config.to_json_string(use_diff=False))
    (folder / "generation_config.json").write_text(source.generation_config.to_json_string())


def _placeholders(
    checkpoint: Checkpoint, model: AdaptedModel, layout: CropLayout, counts: TokenCounts
) -> dict[str, Any]:
    """Let the processors of transformers and transformers.js, which count patches, write T placeholders an image."""
    return {
        "processor_class": type(checkpoint.processor).__name__,
        "image_token": checkpoint.processor.tokenizer.convert_ids_to_tokens(model.image_token_id),
        "patch_size": layout.height // layout.patch_rows,
        "num_additional_image_tokens": counts.keep_tokens - counts.num_tokens,
        "vision_feature_select_strategy": "full",  # "default" would take one off for a CLS token
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")


def build_manifest(
    folder: Path,
    config: ExportConfig,
    checkpoint: Checkpoint,
    model: AdaptedModel,
    selection: SelectionRecord,
    graphs: dict[str, GraphRecord],
    placement: Placement,
) -> Manifest:
    """Describe the package as it lies on disk."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family=checkpoint.family.model_type,
        dtype=config.dtype,
        opset=config.opset,
        context_length=model.text_config.max_position_embeddings,
        source=checkpoint.source,
        selection=selection,
        image=ImageRecord(
            token=checkpoint.processor.tokenizer.convert_ids_to_tokens(model.image_token_id),
            token_id=model.image_token_id,
            layout=model.layout,
        ),
        graphs=graphs,
        files=file_records(folder, digests=placement.digests),
        tools=tool_versions(),
    )


def tool_versions() -> dict[str, str]:
    """Return the versions of everything that shapes an export."""
    packages = ("onnx", "onnx-ir", "onnxscript", "torch", "transformers")
    versions = {name: metadata.version(name) for name in packages}
    return {"promprune": __version__, "python": platform.python_version(), **versions}
