"""The ways of an image into the model: one literal table, one file per layout record of the manifest.

To add a layout: write its record in :mod:`promprune.package.manifest`, a file beside this one with an
:class:`~promprune.runtime.images.base.ImageLayout`, and add its row below.
"""

from __future__ import annotations

from typing import Final

from promprune.package.image import AnyresLayout, CropLayout, GridLayout
from promprune.package.package import Package
from promprune.runtime.images.anyres import Anyres
from promprune.runtime.images.base import ImageLayout, PreparedImage
from promprune.runtime.images.crop import Crop
from promprune.runtime.images.grid import Grids

__all__ = ["LAYOUTS", "ImageLayout", "PreparedImage", "layout_of"]

LAYOUTS: Final[dict[type, type[ImageLayout]]] = {
    CropLayout: Crop,
    AnyresLayout: Anyres,
    GridLayout: Grids,
}


def layout_of(package: Package) -> ImageLayout:
    """Return the layout of a package.

    Raises:
        PackageError: its files are unusable, or do not fit the manifest.
    """
    return LAYOUTS[type(package.manifest.image.layout)](package)
