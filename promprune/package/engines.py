"""Engines built from a package: their files, their identity, and how they are written and read.

Layout, inside the package::

    OUT/engines/<backend>-<target>/
      engine.json                 described by :class:`EngineManifest`
      <graph>.engine              one for every graph of the package
      <graph>.runtime-cache       kernels that TensorRT for RTX compiled on this machine; written by the runtime
    OUT/engines/<backend>-<target>.timing-cache   kernels that TensorRT measured; written by the builder

An engine runs on one kind of GPU, with one version of one tool, and only for the weights it was built from. All
of that is its identity; an engine with another identity than the expected one is refused, and the message names the
difference. This module needs neither torch nor onnx nor TensorRT.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import msgspec

from promprune.checks import check_integer, check_name
from promprune.errors import BackendError, ConfigError, PackageError
from promprune.files import writing_folder
from promprune.inputs import read_file
from promprune.package.contents import read_record
from promprune.package.manifest import Manifest, TensorRecord, sha256_of_file
from promprune.package.record import Count, Digest, Record, Size

__all__ = [
    "CURRENT",
    "ENGINE_BACKENDS",
    "ENGINE_FILE",
    "EngineBackend",
    "EngineConfig",
    "EngineIdentity",
    "EngineManifest",
    "EngineRecipe",
    "EngineRecord",
    "ProfileRecord",
    "ShapeRange",
    "current_target",
    "difference",
    "engine_folder",
    "engine_platform",
    "graph_digests",
    "identity_of",
    "parse_target",
    "read_engines",
    "read_plan",
    "timing_cache_file",
    "write_engine_manifest",
    "writing_engines",
]

EngineBackend = Literal["tensorrt", "tensorrt-rtx"]

ENGINE_BACKENDS: Final = get_args(EngineBackend)
ENGINE_SCHEMA_VERSION: Final = 2
ENGINE_FILE: Final = "engine.json"
CURRENT: Final = "current"  # target: the GPU of this machine

# Increased when the same settings would give another engine; engines of an older recipe are stale.
RECIPE: Final = 1

_BUILD_AGAIN: Final = "run promprune-build with --rebuild"
_CUDA_MAJOR, _CUDA_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR

Dims = tuple[Size, ...]
FileName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_]+\.engine$")]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Settings of ``promprune-build``.

    Attributes:
        backend: ``"tensorrt"``, which builds for the GPU of this machine; or ``"tensorrt-rtx"``, also for other GPUs.
        targets: compute capabilities such as ``"sm89"``, or ``"current"``; one folder of engines each.
        max_prompt_tokens: longest prompt, in tokens without those of its first image.
        max_new_tokens: longest answer, in tokens.
        max_batch: most images per run of the vision encoder, and most batch rows per run of the decoder.
        decode_profile: give the decoder a separate profile for single tokens; with TensorRT for RTX this doubles
            the size of its engine.
        workspace_mib: scratch memory that one engine may use, in MiB; None for all memory of the device.
        rebuild: rebuild engines that exist.

    Raises:
        ConfigError: a value is out of its range.
    """

    backend: EngineBackend = "tensorrt-rtx"
    targets: tuple[str, ...] = ("current",)
    max_prompt_tokens: int = 1024
    max_new_tokens: int = 256
    max_batch: int = 1
    decode_profile: bool = False
    workspace_mib: int | None = None
    rebuild: bool = False

    def __post_init__(self) -> None:
        check_name(self, "backend", ENGINE_BACKENDS)
        if not self.targets:
            raise ConfigError("received no target", expected="at least one, such as sm89", fix="--target sm89,sm120")
        for name in ("max_prompt_tokens", "max_new_tokens", "max_batch"):
            check_integer(self, name, least=1)
        check_integer(self, "workspace_mib", least=1, optional=True)


class ShapeRange(Record, frozen=True):
    """The shapes of one input that a profile accepts."""

    min: Dims
    opt: Dims  # the shape that the engine is tuned for
    max: Dims


class ProfileRecord(Record, frozen=True):
    """One optimisation profile; its index in the engine is its place in :attr:`EngineRecord.profiles`."""

    name: str  # "any", "prefill" or "decode"
    shapes: dict[str, ShapeRange]  # by the name of the input


class EngineRecord(Record, frozen=True):
    """One engine, built from one graph of the package."""

    file: FileName
    size_bytes: Size
    sha256: Digest
    inputs: tuple[TensorRecord, ...]
    outputs: tuple[TensorRecord, ...]
    profiles: tuple[ProfileRecord, ...]
    build_seconds: float


class EngineRecipe(Record, frozen=True):
    """The settings that shape an engine (see :class:`EngineConfig`)."""

    max_prompt_tokens: Count
    max_new_tokens: Count
    max_batch: Count
    decode_profile: bool
    workspace_mib: Count | None
    recipe: Count = RECIPE


class EngineIdentity(Record, frozen=True):
    """Everything that must match for a folder of engines to be usable."""

    backend: EngineBackend
    tool_version: str
    target: str  # "sm89"
    platform: str  # "linux-x86_64"
    graphs: dict[str, Digest]  # graph -> digest of its ONNX file and weights
    options: EngineRecipe


class EngineManifest(Record, frozen=True):
    """The content of ``engine.json``."""

    schema_version: int
    identity: EngineIdentity
    engines: dict[str, EngineRecord]


def engine_folder(package: Path, backend: str, target: str) -> Path:
    """Return the folder of a package's engines for one target; it may not exist."""
    return package / "engines" / f"{backend}-{target}"


def timing_cache_file(package: Path, backend: str, target: str) -> Path:
    """Return the file of kernels measured for one target; it is outside the folder that a rebuild replaces."""
    return package / "engines" / f"{backend}-{target}.timing-cache"


def engine_platform() -> str:
    """Return operating system and processor, such as ``linux-x86_64``; engines run only there."""
    return f"{sys.platform}-{platform.machine().lower().replace('amd64', 'x86_64')}"


def graph_digests(manifest: Manifest) -> dict[str, str]:
    """Return one SHA-256 per graph, computed from those of its ONNX file and weights in the manifest."""
    digests: dict[str, str] = {}
    for name, graph in manifest.graphs.items():
        wanted = {graph.file, *graph.weights}
        parts = sorted((record.path, record.sha256) for record in manifest.files if record.path in wanted)
        digests[name] = hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
    return digests


def identity_of(manifest: Manifest, config: EngineConfig, *, tool_version: str, target: str) -> EngineIdentity:
    """Return the identity that engines of this package would have if they were built here with these settings."""
    return EngineIdentity(
        backend=config.backend,
        tool_version=tool_version,
        target=target,
        platform=engine_platform(),
        graphs=graph_digests(manifest),
        options=msgspec.convert(config, EngineRecipe, from_attributes=True),
    )


def difference(found: EngineIdentity, wanted: EngineIdentity, *, options: bool = True) -> str | None:
    """Describe in words how engines differ from the expected ones; None if they do not.

    Args:
        found: identity of the engines.
        wanted: the expected identity.
        options: also compare the settings, which matter for a build, but not for a run.
    """
    if found.backend != wanted.backend:
        return f"built by {found.backend}, not by {wanted.backend}"
    if found.tool_version != wanted.tool_version:
        return f"built by {found.backend} {found.tool_version}; this is {wanted.tool_version}"
    if found.platform != wanted.platform:
        return f"built for {found.platform}; this is {wanted.platform}"
    if found.target != wanted.target:
        return f"built for {found.target}, not for {wanted.target}"
    for name in sorted(wanted.graphs.keys() - found.graphs.keys()):
        return f"built without {name}.onnx, which the package has"
    for name in sorted(found.graphs):
        if found.graphs.get(name) != wanted.graphs.get(name):
            return f"built from another {name}.onnx or other weights than the package has"
    return _options_difference(found.options, wanted.options) if options else None


def _options_difference(found: EngineRecipe, wanted: EngineRecipe) -> str | None:
    for field in EngineRecipe.__struct_fields__:
        old, new = getattr(found, field), getattr(wanted, field)
        if old != new:
            return f"built with {field} = {_format_option(old)}, not {_format_option(new)}"
    return None


def _format_option(value: int | None) -> str:
    return "unlimited" if value is None else str(value).lower()


def read_engines(folder: Path, *, check_digests: bool = False) -> EngineManifest:
    """Read and validate a folder of engines; every engine must exist with its recorded size.

    Args:
        folder: the folder, see :func:`engine_folder`.
        check_digests: also compare the SHA-256 of every engine, which reads all their bytes.

    Raises:
        PackageError: there are no engines, the schema version differs, or an engine is missing, changed, or has
            profiles that do not match its inputs.
    """
    path = folder / ENGINE_FILE
    manifest = _parse(path)
    for name, record in manifest.engines.items():
        _check_profiles(path, record)
        file = folder / record.file
        size_bytes = file.stat().st_size if file.is_file() else None
        if size_bytes is None:
            raise PackageError(f"{record.file} is missing from {folder}", fix=_BUILD_AGAIN)
        changed = size_bytes != record.size_bytes or (check_digests and sha256_of_file(file) != record.sha256)
        if changed or record.file != f"{name}.engine":
            raise _changed(folder, record)
    return manifest


def read_plan(folder: Path, record: EngineRecord) -> bytes:
    """Return a serialized engine, after comparing its SHA-256 with its record.

    Raises:
        PackageError: the engine cannot be read, or was changed.
    """
    try:
        plan = read_file(folder / record.file, most_bytes=record.size_bytes)
    except OSError as error:
        raise PackageError(f"{record.file} in {folder} cannot be read ({error.strerror})", fix=_BUILD_AGAIN) from error
    if hashlib.sha256(plan).hexdigest() != record.sha256:
        raise _changed(folder, record)
    return plan


def _changed(folder: Path, record: EngineRecord) -> PackageError:
    return PackageError(f"{record.file} in {folder} was changed since it was built", fix=_BUILD_AGAIN)


def _check_profiles(path: Path, record: EngineRecord) -> None:
    if not record.profiles:
        raise PackageError(f"{path} has no profile of {record.file}", expected="at least one", fix=_BUILD_AGAIN)
    for profile in record.profiles:
        if not _matches_inputs(profile, record):
            raise PackageError(
                f"{path} has a profile {profile.name!r} of {record.file} that does not fit its inputs",
                expected=f"shapes of {', '.join(f'{t.name}{list(t.shape)}' for t in record.inputs)}",
                fix=_BUILD_AGAIN,
            )


def _matches_inputs(profile: ProfileRecord, record: EngineRecord) -> bool:
    """Return whether a profile has exactly the inputs of its engine, with shapes of the same rank."""
    if profile.shapes.keys() != {tensor.name for tensor in record.inputs}:
        return False
    ranges = [(profile.shapes[tensor.name], len(tensor.shape)) for tensor in record.inputs]
    return all(len(dims) == rank for range_, rank in ranges for dims in (range_.min, range_.opt, range_.max))


def _parse(path: Path) -> EngineManifest:
    try:
        return read_record(
            path, EngineManifest, version=ENGINE_SCHEMA_VERSION, fix=_BUILD_AGAIN, what="engine manifest"
        )
    except OSError as error:
        raise PackageError(
            f"{path.parent} contains no engines ({error.strerror})", expected="a folder that promprune-build wrote"
        ) from error


def write_engine_manifest(folder: Path, identity: EngineIdentity, engines: dict[str, EngineRecord]) -> EngineManifest:
    """Write ``engine.json`` into a folder of engines before the folder is moved into place."""
    manifest = EngineManifest(schema_version=ENGINE_SCHEMA_VERSION, identity=identity, engines=engines)
    content = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    (folder / ENGINE_FILE).write_bytes(content + b"\n")
    return manifest


@contextmanager
def writing_engines(output: Path) -> Iterator[Path]:
    """Yield an empty folder that replaces ``output`` when the block succeeds.

    Raises:
        OutputError: it cannot be written.
    """
    with writing_folder(output, replace=True, fix="free space there, or make the package writable") as partial:
        yield partial


def parse_target(text: str) -> str:
    """Normalise the name of a target: ``sm89``, ``SM89``, ``8.9`` and ``89`` become ``"sm89"``.

    Raises:
        ConfigError: it is neither a compute capability nor ``current``.
    """
    cleaned = text.strip().lower()
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)", cleaned)
    if match:
        return f"sm{match[1]}{match[2]}"
    if cleaned != CURRENT:
        raise ConfigError(
            f"received target {text!r}", expected="a compute capability such as sm89, or current", fix="--target sm89"
        )
    return cleaned


def current_target() -> str:
    """Return the compute capability of this machine's first CUDA device, such as ``sm89``.

    Raises:
        BackendError: there is no driver, or no device.
    """
    try:
        cuda: Any = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError as error:
        raise _no_device("no NVIDIA driver is installed here") from error
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _CUDA_MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CUDA_MINOR, device)
    )
    if failed:
        raise _no_device(f"the driver finds none, CUDA error {failed}")
    return f"sm{major.value}{minor.value}"


def _no_device(reason: str) -> BackendError:
    return BackendError(
        f"this machine has no usable GPU ({reason})",
        expected="an NVIDIA GPU with its driver, or a named target",
        fix="run this on a machine with the GPU, or build for it with --backend tensorrt-rtx --target sm89",
    )
