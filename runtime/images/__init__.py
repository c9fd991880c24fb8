"""How images enter a model: one file per kind, with its preprocessing, postprocessing and positions.

To add a kind: write its record in :mod:`promprune.package.image`, a file in this folder with an
:class:`~promprune.runtime.images.base.ImageProcessor`, and add its row to the table below.
"""

from __future__ import annotations

from typing import Final

from promprune.package.image import AnyresLayout, CropLayout, GridLayout
from promprune.package.package import Package
from promprune.runtime.images.anyres import AnyresProcessor
from promprune.runtime.images.base import ImageProcessor, PreprocessedImage
from promprune.runtime.images.crop import CropProcessor
from promprune.runtime.images.grid import GridProcessor

__all__ = ["PROCESSORS", "ImageProcessor", "PreprocessedImage", "open_processor"]

PROCESSORS: Final[dict[type, type[ImageProcessor]]] = {
    CropLayout: CropProcessor,
    AnyresLayout: AnyresProcessor,
    GridLayout: GridProcessor,
}


def open_processor(package: Package) -> ImageProcessor:
    """Return the image processor of a package.

    Raises:
        PackageError: its files are unusable, or do not match the manifest.
    """
    return PROCESSORS[type(package.manifest.image.layout)](package)
