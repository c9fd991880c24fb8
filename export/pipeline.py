"""The export: from a checkpoint to a verified package."""

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
from promprune.export.checkpoint.prompts import chat_template, refuse_unusable_template
from promprune.export.checkpoint.weights import read_linked, torch_dtype
from promprune.export.config import ExportConfig, default_output
from promprune.export.families import Family
from promprune.export.graphs.decoder import check_rotary_frequencies, decoder_graph, embed_tokens_graph
from promprune.export.graphs.external_data import ExternalData
from promprune.export.graphs.selector import build_selector
from promprune.export.graphs.trace import save_graph
from promprune.export.graphs.vision import vision_graph
from promprune.export.lower.build import try_to_lower
from promprune.export.quantize.graph import format_products
from promprune.export.verify.verification import verify_package
from promprune.package.image import ImageRecord
from promprune.package.manifest import (
    CHAT_TEMPLATE_FILE,
    DECODER,
    EMBED_TOKENS,
    SCHEMA_VERSION,
    TOKEN_SELECTOR,
    VISION_ENCODER,
    FileRecord,
    GraphRecord,
    Manifest,
    SelectionRecord,
    TokenCounts,
    WeightsRecord,
    file_records,
    write_manifest,
    writing_package,
)
from promprune.package.package import Package
from promprune.progress import NO_PROGRESS, Progress

__all__ = ["ExportResult", "default_output", "export_package"]

ROUNDING: Final = "ratio x num_tokens rounded half to even, at least 1"


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """A package that was written.

    Attributes:
        output: its folder.
        manifest: its manifest.
        seconds: wall time of the export.
        not_lowered: why there is no lowered decoder; empty if there is one, or no decoder at all.
    """

    output: Path
    manifest: Manifest
    seconds: float
    not_lowered: str = ""

    @property
    def package(self) -> Package:
        """The folder and the manifest as one object."""
        return Package(self.output, self.manifest)


def export_package(config: ExportConfig, *, progress: Progress = NO_PROGRESS) -> ExportResult:
    """Export a model with its selection, verify the package, and move it into place by one rename.

    Raises:
        PrompruneError: one of its subclasses, if something is refused or fails; nothing is left behind then.
    """
    started = time.perf_counter()
    output = config.output or default_output(config)
    progress.announce(2 + config.verify + (not config.vision_only))
    with writing_package(output, force=config.force) as folder:
        with progress.step("read the checkpoint"):
            checkpoint = load_checkpoint(config.model, dtype=torch_dtype(config.dtype))
            weights = config.weights(checkpoint.weight_record)
            config = config.for_weights(weights)
            make_fake(checkpoint.meta_model)
            family = checkpoint.family(checkpoint.meta_model, checkpoint.processor, config.image_grids)
            if not config.vision_only:
                check_rotary_frequencies(family.text_config)
                refuse_unusable_template(checkpoint.processor, family.image_token_id)
            tokens = {vision.name: config.token_counts(vision.num_tokens) for vision in family.vision_modules}
            selection = selection_record(config, read_constants(checkpoint.folder))
        data = ExternalData.create(folder / "onnx", checkpoint.digests, copy=config.copy_weights)
        makers = graph_makers(config, family, selection, tokens)
        progress.announce(len(makers))
        graphs = {}
        for name, make in makers.items():
            with progress.step(f"export {name}"):
                graph = format_products(make(), weights.of(name), config.dtype)
                graphs[name] = save_graph(graph, name, data, tokens.get(name))
        data.remove_unused()
        with progress.step("write tokenizer and configuration"):
            write_client_files(folder, checkpoint, family, tokens[VISION_ENCODER])
            files = file_records(folder, digests=data.digests)
            manifest = build_manifest(config, checkpoint, family, selection, weights, graphs, files)
            write_manifest(folder, manifest)
        if config.verify:
            with progress.step("verify against the model"):
                manifest = verified(folder, manifest, checkpoint)
                write_manifest(folder, manifest)
        not_lowered = ""
        if not config.vision_only:
            with progress.step("lower the decoder for ONNX Runtime"):
                not_lowered = try_to_lower(Package(folder, manifest))
    seconds = time.perf_counter() - started
    return ExportResult(output=output, manifest=manifest, seconds=seconds, not_lowered=not_lowered)


def selection_record(config: ExportConfig, own: Mapping[str, float]) -> SelectionRecord:
    """Settle the parameters of the selection, given those of the model's own."""
    return SelectionRecord(
        config=config.selection(own),
        parameters_from=config.parameters_from(own),
        loop=config.loop,
        requested_ratio=config.ratio if config.keep_tokens is None else None,
        rounding=ROUNDING,
    )


def graph_makers(
    config: ExportConfig, family: Family, selection: SelectionRecord, tokens: Mapping[str, TokenCounts]
) -> dict[str, Callable[[], ir.Model]]:
    """Return what exports each graph of the package, by the graph's name, in the order in which they are exported."""
    opset = config.opset
    makers: dict[str, Callable[[], ir.Model]] = {}
    selectors = {}
    for vision in family.vision_modules:
        selectors[vision.name] = partial(
            build_selector,
            vision.num_tokens,
            family.text_config.hidden_size,
            tokens[vision.name].keep_tokens,
            selection.config,
            batch_size="batch_size" if vision.is_batched else 1,
            token_mask=vision.token_mask,
            dtype=BY_NAME[config.dtype].numpy,
            loop=selection.loop,
            opset=opset,
        )
        makers[vision.name] = partial(vision_graph, vision, tokens[vision.name], selectors[vision.name], opset=opset)
    if not config.vision_only:
        makers[EMBED_TOKENS] = partial(embed_tokens_graph, family, opset=opset)
        makers[DECODER] = partial(decoder_graph, family, opset=opset)
    if config.split_selector:
        makers[TOKEN_SELECTOR] = lambda: ir.from_proto(selectors[VISION_ENCODER]())
    return makers


def verified(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> Manifest:
    """Compare a package with its source, and return its manifest with what was found.

    Raises:
        VerificationError: they disagree.
    """
    verification = verify_package(Package(folder, manifest), checkpoint)
    if not verification.passed:
        raise VerificationError("the package disagrees with the model", checks=verification.checks)
    return msgspec.structs.replace(manifest, verification=verification)


def write_client_files(folder: Path, checkpoint: Checkpoint, family: Family, tokens: TokenCounts) -> None:
    """Write what clients read besides the graphs, as transformers and transformers.js expect it.

    Tokenizer, chat template, configurations of the preprocessing and of the model, and the arrays of the family.
    """
    processor, source = checkpoint.processor, checkpoint.meta_model
    template = chat_template(processor)
    processor.tokenizer.chat_template = template
    # In tokenizer_config.json: transformers.js reads no other templates.
    processor.tokenizer.save_pretrained(folder, save_jinja_files=False)
    if isinstance(template, str):
        (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")
    preprocessor = processor.image_processor.to_dict()
    preprocessor["image_processor_type"] = preprocessor["image_processor_type"].removesuffix("Pil").removesuffix("Fast")
    if not family.layout.grid_sizes:
        preprocessor.setdefault("do_center_crop", False)  # SigLIP's file lacks it; clients would assume true
    if family.layout.patch_pixels is not None:
        preprocessor["processor_class"] = type(processor).__name__
        _write_json(folder / "processor_config.json", _placeholders(family, tokens))
    _write_json(folder / "preprocessor_config.json", preprocessor)
    (folder / "config.json").write_text(source.config.to_json_string(use_diff=False))
    (folder / "generation_config.json").write_text(source.generation_config.to_json_string())
    for name, parameter in family.arrays.items():
        np.save(folder / name, read_linked(parameter).numpy())


def _placeholders(family: Family, tokens: TokenCounts) -> dict[str, Any]:
    """Return settings that make the processors of transformers and transformers.js write T placeholders per image."""
    return {
        "processor_class": type(family.processor).__name__,
        "image_token": family.image_token,
        "patch_size": family.layout.patch_pixels,
        "num_additional_image_tokens": tokens.keep_tokens - tokens.num_tokens,
        "vision_feature_select_strategy": "full",  # "default" would subtract one for a CLS token
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, default=str) + "\n")


def build_manifest(
    config: ExportConfig,
    checkpoint: Checkpoint,
    family: Family,
    selection: SelectionRecord,
    weights: WeightsRecord,
    graphs: dict[str, GraphRecord],
    files: tuple[FileRecord, ...],
) -> Manifest:
    """Describe the package."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        family=family.model_type,
        dtype=config.dtype,
        opset=config.opset,
        context_length=family.text_config.max_position_embeddings,
        source=checkpoint.source,
        selection=selection,
        image=ImageRecord(token=family.image_token, token_id=family.image_token_id, layout=family.layout),
        graphs=graphs,
        files=files,
        tools=tool_versions(),
        weights=weights,
    )


def tool_versions() -> dict[str, str]:
    """Return the versions of all tools that affect an export."""
    packages = ("onnx", "onnx-ir", "onnxscript", "torch", "transformers")
    versions = {name: metadata.version(name) for name in packages}
    return {"promprune": __version__, "python": platform.python_version(), **versions}
