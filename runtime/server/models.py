"""The packages that a server answers with: several ratios of one model share its language model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from promprune.closing import Closing
from promprune.errors import ConfigError
from promprune.package.manifest import Manifest, read_manifest
from promprune.runtime.engine.loading import same_language_model
from promprune.runtime.pipeline import VisionLanguagePipeline
from promprune.runtime.server.schema import ModelCard, ModelDetail
from promprune.runtime.sessions.config import RuntimeConfig

__all__ = ["ModelCatalog", "ServedModel", "model_name"]


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A package under the name by which clients ask for it.

    Attributes:
        name: its name, such as ``llava-1.5-7b-hf@0.12``.
        pipeline: the loaded package.
        created: Unix time when it was loaded.
    """

    name: str
    pipeline: VisionLanguagePipeline
    created: int

    def warm_up(self) -> None:
        """Answer once, so that the first client does not wait for what is loaded on first use.

        Raises:
            BackendError, PackageError: the model cannot answer.
        """
        self.pipeline.generate(np.zeros((64, 64, 3), np.uint8), "a", max_new_tokens=2, ignore_eos=True)

    def card(self, max_images: int) -> ModelCard:
        """Describe it for ``/v1/models``."""
        manifest = self.pipeline.manifest
        counts = manifest.tokens_of(manifest.image.layout.vision_graphs[0])
        detail = ModelDetail(
            ratio=ratio_of(manifest),
            visual_tokens=counts.num_tokens,
            kept_tokens=counts.keep_tokens,
            context_length=manifest.context_length,
            max_images=max_images,
        )
        return ModelCard(id=self.name, created=self.created, promprune=detail)


class ModelCatalog(Closing):
    """The loaded packages, by name; close it to free them.

    Args:
        models: the packages.
    """

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._models = {model.name: model for model in models}

    @classmethod
    def load(cls, packages: Sequence[str], config: RuntimeConfig) -> Self:
        """Load packages, and every language model only once.

        Args:
            packages: folders, or ``NAME=FOLDER`` to serve a folder as ``NAME@RATIO``.
            config: settings of all of them.

        Raises:
            ConfigError: two packages have the same name.
            PackageError, BackendError: see :meth:`VisionLanguagePipeline.from_package`.
        """
        models: list[ServedModel] = []
        with ExitStack() as loaded:
            for name, folder in map(_name_and_folder, packages):
                manifest = read_manifest(folder)
                full_name = model_name(manifest, folder, name)
                if full_name in (model.name for model in models):
                    raise ConfigError(
                        f"two packages are called {full_name}",
                        expected="different names",
                        fix="write NAME=PACKAGE for one of them",
                    )
                pipeline = _open(folder, manifest, [model.pipeline for model in models], config)
                loaded.callback(pipeline.close)
                models.append(ServedModel(full_name, pipeline, int(time.time())))
            loaded.pop_all()
        return cls(models)

    def find(self, name: str) -> ServedModel | None:
        """Return a model by its name; None if there is none."""
        return self._models.get(name)

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def close(self) -> None:
        """Free the packages."""
        for model in self:
            model.pipeline.close()


def model_name(manifest: Manifest, folder: Path, name: str | None = None) -> str:
    """Return the name of a package: that of its model, or a chosen one, and the ratio, such as ``embedded@0.12``."""
    return f"{name or manifest.source.model or folder.name}@{ratio_of(manifest)}"


def ratio_of(manifest: Manifest) -> float:
    """Return the fraction of the visual tokens that is kept: the one that was asked for, or T / N."""
    requested = manifest.selection.requested_ratio
    counts = manifest.tokens_of(manifest.image.layout.vision_graphs[0])
    return round(counts.ratio, 3) if requested is None else float(requested)


def _name_and_folder(package: str) -> tuple[str | None, Path]:
    name, equals, folder = package.partition("=")
    if equals and name and "/" not in name and not Path(package).exists():
        return name, Path(folder)
    return None, Path(package)


def _open(
    folder: Path, manifest: Manifest, others: Sequence[VisionLanguagePipeline], config: RuntimeConfig
) -> VisionLanguagePipeline:
    """Load a package, with the language model of another one if that is the same."""
    for other in others:
        if same_language_model(manifest, other.manifest):
            return other.with_vision_of(folder, **vars(config))
    return VisionLanguagePipeline.from_package(folder, **vars(config))
