"""Making the lowered decoder of a package: lower, verify and write it, or give the reason why it is impossible."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime

from promprune.errors import UnsupportedModelError, VerificationError
from promprune.export.checkpoint.out_of_core import available_memory
from promprune.export.graphs.trace import tensor_record
from promprune.export.lower.onnxruntime import lower_decoder
from promprune.export.lower.verify import Array, check_logits, lowered_logits, portable_logits
from promprune.package.engines import writing_engines
from promprune.package.lowered import (
    LoweredManifest,
    lowered_folder,
    lowered_manifest,
    read_lowered,
    write_lowered_manifest,
)
from promprune.package.manifest import DECODER, EMBED_TOKENS, CheckRecord, GraphRecord
from promprune.package.package import Package
from promprune.runtime.sessions import open_session
from promprune.runtime.sessions.config import RuntimeConfig
from promprune.runtime.sessions.onnxruntime import OnnxRuntimeSession

__all__ = ["LoweredDecoder", "lower_package", "try_to_lower"]

_ON_CPU: Final = RuntimeConfig(provider="cpu", accuracy_level=0)
_SAMPLE_ROWS: Final = 3
_SAMPLE_POSITIONS: Final = 64
_MEMORY_FACTOR: Final = 2  # times the weights: ONNX Runtime rearranges them for its kernels


class LoweredDecoder(NamedTuple):
    """The lowered decoder of a package.

    Attributes:
        folder: its folder.
        manifest: content of ``lowered.json``.
        built: whether it was made now; false if it was up to date.
    """

    folder: Path
    manifest: LoweredManifest
    built: bool


def try_to_lower(package: Package) -> str:
    """Lower the decoder of a package during its export; return the reason if it is impossible, else an empty text."""
    if package.manifest.dtype == "bf16":
        return "ONNX Runtime does not run bf16 on a CPU"
    verification = package.manifest.verification
    if verification is not None and verification.not_verified:
        return "the model was verified out of core; promprune-build lowers its decoder if that fits into memory"
    try:
        lower_package(package)
    except (UnsupportedModelError, VerificationError) as error:
        return str(error)
    return ""


def lower_package(package: Package, *, rebuild: bool = False) -> LoweredDecoder:
    """Lower the decoder of a package for ONNX Runtime, verify it against the portable one, and write it.

    Args:
        package: the package, finished or before it is moved into place.
        rebuild: also replace an existing lowered decoder.

    Raises:
        UnsupportedModelError: this decoder cannot be lowered, or not be verified here; the message says why.
        VerificationError: the lowered decoder gives different results; nothing is written.
        PackageError: there is a stale lowered decoder, and ``rebuild`` is false.
        OutputError: the package folder cannot be written.
    """
    version, folder = onnxruntime.__version__, lowered_folder(package.folder)
    found = None if rebuild else read_lowered(package, tool_version=version)
    if found is not None:
        return LoweredDecoder(folder, found, built=False)
    _check_verifiable(package)
    model = ir.load(package.graph_file(DECODER))
    lower_decoder(model)
    with writing_engines(folder) as partial:
        file = partial / f"{DECODER}.onnx"
        file.write_bytes(ir.to_proto(model).SerializeToString())
        record = GraphRecord(
            file=(folder / file.name).relative_to(package.folder).as_posix(),
            weights=package.manifest.graphs[DECODER].weights,
            inputs=tuple(tensor_record(value) for value in model.graph.inputs),
            outputs=tuple(tensor_record(value) for value in model.graph.outputs),
        )
        checks = _verify(package, file)
        if not all(check.passed for check in checks):
            raise VerificationError("the lowered decoder disagrees with the portable one", checks=checks)
        lowered = lowered_manifest(package.manifest, record, file, tool_version=version, checks=checks)
        write_lowered_manifest(partial, lowered)
    return LoweredDecoder(folder, lowered, built=True)


def _check_verifiable(package: Package) -> None:
    """Refuse a decoder that cannot run on this machine."""
    if not package.manifest.has_language_model:
        raise UnsupportedModelError("the package has no decoder: it was exported with --vision-only")
    size_bytes = sum((package.folder / name).stat().st_size for name in package.manifest.graphs[DECODER].weights)
    if size_bytes * _MEMORY_FACTOR > available_memory():
        raise UnsupportedModelError(
            f"the decoder has {size_bytes / 1e9:.1f} GB of weights, too many to verify it in the available memory",
            expected=f"{_MEMORY_FACTOR} times as much available memory",
        )


def _verify(package: Package, file: Path) -> tuple[CheckRecord, ...]:
    """Compare the lowered graph with the portable one; only one of them is in memory at a time."""
    embeds = _sample_embeds(package)
    with open_session(package, DECODER, _ON_CPU) as session:
        reference = portable_logits(session, embeds)
    with OnnxRuntimeSession(file, _ON_CPU, weights=package.graph_file(DECODER).parent) as session:
        return check_logits(reference, lowered_logits(session, embeds), embeds.dtype.name)


def _sample_embeds(package: Package) -> Array:
    """Return the embeddings of random tokens: [rows, positions, hidden]."""
    outputs = package.manifest.graphs[DECODER].outputs
    vocabulary = next(int(output.shape[-1]) for output in outputs if output.name == "logits")
    ids = np.random.default_rng(0).integers(0, vocabulary, (_SAMPLE_ROWS, _SAMPLE_POSITIONS))
    with open_session(package, EMBED_TOKENS, _ON_CPU) as session:
        return session.run({"input_ids": ids})["inputs_embeds"]
