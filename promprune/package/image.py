"""How images enter a model: one record per kind of layout, with everything that depends on the kind."""

from __future__ import annotations

import math
from typing import Annotated, Final

import msgspec

from promprune.package.record import Count, Record, Size

__all__ = [
    "IMAGE_NEWLINE_FILE",
    "VISION_ENCODER",
    "AnyresLayout",
    "CropLayout",
    "GridLayout",
    "GridRecord",
    "ImageRecord",
]

VISION_ENCODER: Final = "vision_encoder"  # name of the first vision graph, and of the only one of most packages
SHRINK_ABOVE: Final = 1.1  # transformers' threshold for the ratio of the sides
IMAGE_NEWLINE_FILE: Final = "image_newline.npy"  # float32 [D]; in packages of layout "anyres"


class _Layout(Record, frozen=True):
    """Base class of layouts; by default an image is one row of a vision graph's batch, and T tokens of a prompt."""

    @property
    def vision_graphs(self) -> tuple[str, ...]:
        """Names of the vision graphs, in order."""
        return (VISION_ENCODER,)

    @property
    def max_crops(self) -> int:
        """The most rows of a vision graph's batch that one image needs."""
        return 1

    @property
    def grid_sizes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the possible sizes of images, in tokens; empty if the family has no choice of sizes."""
        return ()

    @property
    def patch_pixels(self) -> int | None:
        """Side of a patch, if an image is one crop whose patches other clients may count; else None."""
        return None

    def max_placeholders(self, keep_tokens: int) -> int:
        """Return the most tokens that one image can have in a prompt, given T."""
        return keep_tokens


class CropLayout(_Layout, frozen=True, tag_field="kind", tag="crop"):
    """Every image becomes one crop of a fixed size."""

    height: Count  # of pixel_values, pixels
    width: Count
    patch_rows: Count  # patch_rows * patch_columns == num_tokens, in raster order
    patch_columns: Count

    @property
    def patch_pixels(self) -> int:
        """Side of a patch."""
        return self.height // self.patch_rows


class AnyresLayout(_Layout, frozen=True, tag_field="kind", tag="anyres"):
    """Every image becomes one crop of the entire image, and several enlarged ones; N and T are per crop."""

    side: Count  # of a crop, pixels
    patches: Count  # per row and per column of a crop: patches**2 == num_tokens
    canvases: Annotated[tuple[tuple[Count, Count], ...], msgspec.Meta(min_length=1)]  # height, width; pixels
    # If all tokens are kept, a picture with more tokens than some 1.2 times these many crops is shrunk to them.
    shrink_to_crops: Count | None = None
    one_crop_each: bool = False  # whether each of several images in one prompt is a single crop

    @property
    def max_crops(self) -> int:
        """The most rows of a vision graph's batch that one image needs: the crop of the entire image, and others."""
        return 1 + max(height * width for height, width in self.canvases) // self.side**2

    def max_placeholders(self, keep_tokens: int) -> int:
        """Return the most tokens that one image can have in a prompt, including newlines, given T of a crop."""
        if keep_tokens != self.patches**2:
            return self.max_crops * keep_tokens
        grids = [
            (height * self.patches // self.side, width * self.patches // self.side) for height, width in self.canvases
        ]
        return keep_tokens + max(self._max_shown(rows, columns) for rows, columns in grids)

    def shrunk(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the rows and columns of a picture's tokens if all of them are kept; transformers' arithmetic."""
        if self.shrink_to_crops is None:
            return rows, columns
        ratio = math.sqrt(rows * columns / (self.shrink_to_crops * self.patches**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > SHRINK_ABOVE else (rows, columns)

    def _max_shown(self, rows: int, columns: int) -> int:
        """Return the most tokens of a picture on a canvas of this size, including newlines; less padding is more."""
        if self.shrink_to_crops is None:
            return rows * (columns + 1)
        most = math.floor(SHRINK_ABOVE**2 * self.shrink_to_crops * self.patches**2)
        return min(rows * columns, most) + rows


class GridRecord(Record, frozen=True):
    """One size in which images enter the model."""

    graph: str  # name of its vision graph
    rows: Count  # of tokens, in raster order
    columns: Count


class GridLayout(_Layout, frozen=True, tag_field="kind", tag="grid"):
    """Every image is resized to the one of several grids that distorts it least; each has a vision graph."""

    token_pixels: Count  # side of the square of pixels that becomes one token
    grids: Annotated[tuple[GridRecord, ...], msgspec.Meta(min_length=1)]

    @property
    def vision_graphs(self) -> tuple[str, ...]:
        """Names of the vision graphs, one for each grid."""
        return tuple(grid.graph for grid in self.grids)

    @property
    def grid_sizes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the grids."""
        return tuple((grid.rows, grid.columns) for grid in self.grids)


class ImageRecord(Record, frozen=True):
    """How one image enters the model."""

    token: str  # placeholder text in a prompt
    token_id: Size
    layout: CropLayout | AnyresLayout | GridLayout  # told apart by "kind"
