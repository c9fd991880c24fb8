"""A cache of packages that are exported for benchmarks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from promprune._version import __version__
from promprune.dtypes import Dtype
from promprune.errors import PackageError
from promprune.export.config import ExportConfig
from promprune.method.config import SelectionPolicy
from promprune.package.manifest import read_manifest
from promprune.progress import Progress

__all__ = ["default_cache", "packages_of"]


def default_cache() -> Path:
    """Return the default folder of the cache: ``promprune/bench`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "promprune" / "bench"


def packages_of(
    model: str | None,
    ratios: Sequence[float],
    dtype: Dtype,
    policies: Sequence[SelectionPolicy],
    cache: Path,
    progress: Progress,
) -> dict[str, Path]:
    """Return packages of a model by their names in the report; export those that are missing.

    Args:
        model: folder or hub id; None for the embedded model.
        ratios: ratios of the packages.
        dtype: dtype of the packages.
        policies: further policies; each is exported for every ratio below 1.
        cache: folder of all packages.
        progress: receives the steps of the exports.

    Raises:
        PrompruneError: a package cannot be made.
    """
    plain = ExportConfig(model=model, dtype=dtype, verify=False)
    configs = {f"{ratio:g}": replace(plain, ratio=ratio) for ratio in ratios}
    for policy in policies:
        configs |= {f"{ratio:g}, {policy}": replace(plain, ratio=ratio, policy=policy) for ratio in ratios if ratio < 1}
    folders = {name: cache / _key(config) for name, config in configs.items()}
    missing = [(configs[name], folder) for name, folder in folders.items() if not _is_complete(folder)]
    if missing:
        _export(missing, progress)
    return folders


def _export(missing: Sequence[tuple[ExportConfig, Path]], progress: Progress) -> None:
    from promprune.export.pipeline import export_package

    progress.announce(1)
    with progress.step("export", items=len(missing)) as step:
        for config, folder in missing:
            export_package(replace(config, output=folder, force=True))
            step.advance()


def _is_complete(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except PackageError:
        return False
    return True


def _key(config: ExportConfig) -> str:
    """Return a name that identifies all inputs of an export; weights by their paths, sizes and modification times."""
    name = "embedded" if config.model is None else Path(config.model).name
    parts = [__version__, str(config.model), config.dtype, str(config.opset), *_weights(config.model)]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return f"{name}-{config.ratio:g}-{config.policy}-{config.dtype}-{digest}"


def _weights(model: str | None) -> list[str]:
    if model is None:
        return []
    files = sorted(path for path in Path(model).glob("*") if path.is_file())
    return [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
