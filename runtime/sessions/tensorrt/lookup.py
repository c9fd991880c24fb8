"""Which engines of a package run on this machine, and which profile of an engine takes the shapes of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from promprune.errors import BackendError, PackageError, PrompruneError
from promprune.package.engines import (
    ENGINE_BACKENDS,
    EngineBackend,
    EngineConfig,
    EngineManifest,
    EngineRecord,
    ProfileRecord,
    difference,
    engine_folder,
    identity_of,
    read_engines,
)
from promprune.package.package import Package
from promprune.runtime.sessions.tensorrt.device import Shapes
from promprune.runtime.sessions.tensorrt.modules import load_tensorrt

__all__ = ["FoundEngines", "choose_profile", "find_engines"]


class FoundEngines(NamedTuple):
    """The engines of a package that can run here, and why other existing engines cannot, in words."""

    backend: EngineBackend
    folder: Path
    manifest: EngineManifest
    notes: tuple[str, ...]


def find_engines(package: Package, target: str) -> FoundEngines:
    """Return the engines of a package for one target.

    If there are usable engines of both backends, those of TensorRT are chosen: they were tuned on the GPU itself.

    Raises:
        PackageError: there are none, or they are damaged, stale or foreign; the message gives the reason per backend.
        MissingDependencyError, BackendError: there are engines of one backend only, and its module does not load.
    """
    refusals: dict[EngineBackend, PrompruneError] = {}
    backend: EngineBackend
    for backend in ENGINE_BACKENDS:
        folder = engine_folder(package.folder, backend, target)
        if not folder.exists():
            continue
        try:
            engines = _usable_engines(package, backend, target)
        except PrompruneError as error:
            refusals[backend] = error
        else:
            notes = tuple(f"not {name}: {reason}" for name, reason in refusals.items())
            return FoundEngines(backend, folder, engines, notes)
    raise _refusal(package.folder, target, refusals)


def _refusal(package: Path, target: str, refusals: Mapping[EngineBackend, PrompruneError]) -> PrompruneError:
    """Return the error for a package without usable engines, with the reason for each backend that has engines."""
    if not refusals:
        return PackageError(
            f"{package} has no engines for this GPU, {target}",
            expected=f"engines/tensorrt-{target} or engines/tensorrt-rtx-{target}",
            fix=f"promprune-build {package} --target {target}",
        )
    first, *others = refusals.values()
    if not others:
        return first
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals.items())
    return PackageError(f"none of the engines of {package} for {target} can be used; {reasons}")


def _usable_engines(package: Package, backend: EngineBackend, target: str) -> EngineManifest:
    """Read the engines of one backend for all graphs of a package, and refuse those that cannot run here."""
    folder = engine_folder(package.folder, backend, target)
    engines = read_engines(folder)
    version = str(load_tensorrt(backend).__version__)
    wanted = identity_of(package.manifest, EngineConfig(backend=backend), tool_version=version, target=target)
    reason = difference(engines.identity, wanted, options=False)
    for name in sorted(package.manifest.graphs.keys() - engines.engines.keys()):
        reason = reason or f"without one of {name}"
    if reason is not None:
        raise PackageError(
            f"the engines in {folder} cannot be used ({reason})",
            expected="engines of this package, tool and GPU",
            fix=f"promprune-build {package.folder} --backend {backend} --target {target} --rebuild",
        )
    return engines


def choose_profile(record: EngineRecord, shapes: Shapes) -> int:
    """Return the index of the narrowest profile that accepts all input shapes.

    Raises:
        BackendError: no profile does; the message names an input, and the shapes that the engine was built for.
    """
    fitting = [(_width(p), i) for i, p in enumerate(record.profiles) if _misfit(p, shapes) is None]
    if fitting:
        return min(fitting)[1]
    name = next(misfit for profile in record.profiles if (misfit := _misfit(profile, shapes)) is not None)
    ranges = [f"{list(p.shapes[name].min)} to {list(p.shapes[name].max)} ({p.name})" for p in record.profiles]
    raise BackendError(
        f"{record.file} received {name}: {list(shapes[name])}",
        expected=" or ".join(ranges),
        fix="build engines with a larger --max-prompt-tokens, --max-new-tokens or --max-batch",
    )


def _misfit(profile: ProfileRecord, shapes: Shapes) -> str | None:
    for name, allowed in profile.shapes.items():
        bounds = zip(allowed.min, shapes[name], allowed.max, strict=True)
        if not all(low <= size <= high for low, size, high in bounds):
            return name
    return None


def _width(profile: ProfileRecord) -> int:
    return sum(sum(shape.max) - sum(shape.min) for shape in profile.shapes.values())
