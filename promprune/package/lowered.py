"""The decoder lowered for ONNX Runtime: its files in the package, and the check that it is up to date.

Layout, inside the package::

    OUT/engines/onnxruntime-cpu/
      lowered.json                  described by :class:`LoweredManifest`
      decoder_model_merged.onnx     the graph; its weights are those of onnx/decoder_model_merged.onnx

It computes the same as the portable decoder, with keys and values in buffers that are updated in place, and can be
deleted at any time. This module needs neither torch nor onnx.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import msgspec

from promprune.errors import PackageError
from promprune.package.contents import read_record
from promprune.package.engines import engine_folder, graph_digests
from promprune.package.manifest import DECODER, CheckRecord, GraphRecord, Manifest, sha256_of_file
from promprune.package.package import Package
from promprune.package.record import Count, Digest, Record

__all__ = [
    "LOWERED_BACKEND",
    "LOWERED_FILE",
    "SEQLENS",
    "TOTAL_LENGTH",
    "LoweredBackend",
    "LoweredManifest",
    "lowered_folder",
    "lowered_manifest",
    "read_lowered",
    "write_lowered_manifest",
]

LoweredBackend = Literal["onnxruntime"]

LOWERED_BACKEND: Final[LoweredBackend] = "onnxruntime"
LOWERED_FILE: Final = "lowered.json"
LOWERED_SCHEMA_VERSION: Final = 1
# Increased when the same package would give another lowered graph; graphs of an older recipe are stale.
LOWERED_RECIPE: Final = 1

# Inputs that the portable decoder does not have.
SEQLENS: Final = "seqlens_k"  # int32 [batch], positions of each row after a run, minus 1
TOTAL_LENGTH: Final = "total_sequence_length"  # int32 [1], the largest number of positions of any row after a run

_BUILD_AGAIN: Final = "run promprune-build with --backend onnxruntime --rebuild, or delete the folder"


class LoweredManifest(Record, frozen=True):
    """The content of ``lowered.json``."""

    schema_version: int
    backend: LoweredBackend
    tool_version: str  # of the ONNX Runtime that it was verified with
    recipe: Count
    decoder: Digest  # of the portable decoder and its weights
    graph: GraphRecord  # its files are relative to the package
    sha256: Digest  # of the graph's file
    checks: tuple[CheckRecord, ...]


def lowered_folder(package: Path) -> Path:
    """Return the folder of a package's lowered decoder; it may not exist."""
    return engine_folder(package, LOWERED_BACKEND, "cpu")


def lowered_manifest(
    manifest: Manifest, graph: GraphRecord, file: Path, *, tool_version: str, checks: tuple[CheckRecord, ...]
) -> LoweredManifest:
    """Describe a lowered decoder in ``file`` that was just made from a package's decoder."""
    return LoweredManifest(
        schema_version=LOWERED_SCHEMA_VERSION,
        backend=LOWERED_BACKEND,
        tool_version=tool_version,
        recipe=LOWERED_RECIPE,
        decoder=graph_digests(manifest)[DECODER],
        graph=graph,
        sha256=sha256_of_file(file),
        checks=checks,
    )


def write_lowered_manifest(folder: Path, lowered: LoweredManifest) -> None:
    """Write ``lowered.json`` into a folder before it is moved into place."""
    (folder / LOWERED_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(lowered), indent=2) + b"\n")


def read_lowered(package: Package, *, tool_version: str) -> LoweredManifest | None:
    """Read the lowered decoder of a package, and check that it was made from the current decoder.

    Args:
        package: the package.
        tool_version: version of ONNX Runtime; older versions than the one it was verified with are refused.

    Returns:
        The manifest of the lowered decoder; None if the package has none.

    Raises:
        PackageError: it is damaged or stale; the message gives the reason.
    """
    folder = lowered_folder(package.folder)
    try:
        lowered = read_record(
            folder / LOWERED_FILE, LoweredManifest, version=LOWERED_SCHEMA_VERSION, fix=_BUILD_AGAIN, what="manifest"
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PackageError(f"{folder / LOWERED_FILE} cannot be read ({error.strerror})", fix=_BUILD_AGAIN) from error
    reason = _staleness(package, lowered, tool_version)
    if reason is not None:
        raise PackageError(f"the lowered decoder in {folder} is stale: {reason}", fix=_BUILD_AGAIN)
    return lowered


def _staleness(package: Package, lowered: LoweredManifest, tool_version: str) -> str | None:
    """Return why a lowered decoder is stale; None if it is up to date."""
    file = lowered_folder(package.folder) / f"{DECODER}.onnx"
    if lowered.recipe != LOWERED_RECIPE:
        return "this promprune lowers in another way"
    if lowered.decoder != graph_digests(package.manifest).get(DECODER):
        return f"it was made from another {DECODER}.onnx or other weights"
    if _release(tool_version) < _release(lowered.tool_version):
        return f"it was verified with ONNX Runtime {lowered.tool_version}; this is {tool_version}"
    if not file.is_file() or sha256_of_file(file) != lowered.sha256:
        return f"{file.name} is missing or was changed"
    return None


def _release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
