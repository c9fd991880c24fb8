"""Building all engines of a package, for every requested target."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from promprune.errors import PackageError
from promprune.export.engine.network import engine_from_onnx
from promprune.export.engine.profiles import profiles_of
from promprune.export.engine.progress import Report
from promprune.export.engine.toolkit import Toolkit, load_toolkit
from promprune.package.engines import (
    EngineConfig,
    EngineIdentity,
    EngineManifest,
    EngineRecord,
    difference,
    engine_folder,
    graph_digests,
    identity_of,
    read_engines,
    timing_cache_file,
    write_engine_manifest,
    writing_engines,
)
from promprune.package.manifest import Manifest, read_manifest
from promprune.progress import NO_PROGRESS, Progress

__all__ = ["BuiltEngines", "build_engines"]


@dataclass(frozen=True, kw_only=True)
class BuiltEngines:
    """The engines of one target.

    Attributes:
        folder: their folder.
        manifest: content of ``engine.json``.
        built: False if they were up to date.
        seconds: wall time of building all of them; 0 if they were up to date.
    """

    folder: Path
    manifest: EngineManifest
    built: bool
    seconds: float


def build_engines(package: Path, config: EngineConfig, *, progress: Progress = NO_PROGRESS) -> tuple[BuiltEngines, ...]:
    """Build the engines of a package for every target, except those that are up to date.

    The engines of one target appear together, by one rename. If a target fails, those built before it remain.

    Raises:
        PackageError: it is not a package, or damaged; or its engines are stale and ``config.rebuild`` is false.
        ConfigError, BackendError, MissingDependencyError: the backend or a target is not available on this machine.
        BackendError: a graph cannot be built; the message names the graph, and the node if it is known.
        OutputError: the package folder cannot be written.
    """
    manifest = read_manifest(package)
    toolkit = load_toolkit(config.backend)
    targets = tuple(dict.fromkeys(toolkit.resolve(target) for target in config.targets))
    return tuple(_build_target(package, manifest, toolkit, target, config, progress) for target in targets)


def _build_target(
    package: Path, manifest: Manifest, toolkit: Toolkit, target: str, config: EngineConfig, progress: Progress
) -> BuiltEngines:
    folder = engine_folder(package, config.backend, target)
    identity = identity_of(manifest, config, tool_version=toolkit.version, target=target)
    if folder.exists() and not config.rebuild:
        return BuiltEngines(folder=folder, manifest=_up_to_date(folder, identity), built=False, seconds=0.0)
    read_manifest(package, check_weights=True)  # damaged weights would be copied into the engine
    started = time.perf_counter()
    records: dict[str, EngineRecord] = {}
    with writing_engines(folder) as partial:
        names = graph_digests(manifest)
        progress.announce(len(names))
        for name in names:
            with progress.step(f"{target} {name}") as step:
                records[name] = _build_one(package, manifest, name, toolkit, target, config, partial, step.report)
        written = write_engine_manifest(partial, identity, records)
    seconds = time.perf_counter() - started
    return BuiltEngines(folder=folder, manifest=written, built=True, seconds=seconds)


def _up_to_date(folder: Path, identity: EngineIdentity) -> EngineManifest:
    """Return the manifest of existing engines if they match ``identity``; refuse to replace others unasked."""
    found = read_engines(folder)
    reason = difference(found.identity, identity)
    if reason is not None:
        raise PackageError(
            f"the engines in {folder} are stale ({reason})",
            expected="engines of this package, tool, target and settings",
            fix="add --rebuild to replace them",
        )
    return found


def _build_one(
    package: Path,
    manifest: Manifest,
    name: str,
    toolkit: Toolkit,
    target: str,
    config: EngineConfig,
    folder: Path,
    report: Report,
) -> EngineRecord:
    """Build one graph into ``folder`` and return its record."""
    graph = manifest.graphs[name]
    profiles = profiles_of(name, manifest, config)
    started = time.perf_counter()
    plan = engine_from_onnx(
        toolkit,
        package / graph.file,
        graph,
        profiles=profiles,
        target=target,
        config=config,
        timing_cache=timing_cache_file(package, config.backend, target),
        report=report,
    )
    seconds = time.perf_counter() - started
    content = memoryview(plan)
    file = folder / f"{name}.engine"
    file.write_bytes(content)
    return EngineRecord(
        file=file.name,
        size_bytes=content.nbytes,
        sha256=hashlib.sha256(content).hexdigest(),
        inputs=graph.inputs,
        outputs=graph.outputs,
        profiles=profiles,
        build_seconds=round(seconds, 3),
    )
