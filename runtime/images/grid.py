"""One of several sizes for every image, each with a vision graph: Qwen2-VL and Qwen2.5-VL.

A picture of any size is resized to one of the grids that a package has graphs for: the one that transformers'
``smart_resize`` would choose, and then the patches are equal to those of transformers; or else the closest one.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from promprune.errors import PackageError
from promprune.package.image import GridLayout, GridRecord
from promprune.package.manifest import GraphRecord
from promprune.package.package import Package
from promprune.runtime.images.base import ImageProcessor, PreprocessedImage, expect, expected_graph, selected_tokens
from promprune.runtime.images.encoded import EncodedImage, TokenGrid, TokenSelection
from promprune.runtime.images.positions import ImagePositions
from promprune.runtime.images.preprocess import PixelFile, SizeDict, normalize, pixel_levels, read_pixel_file
from promprune.runtime.sessions import Array

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["GridPreprocessor", "GridProcessor", "PixelRange", "choose_grid", "grid_positions"]

_MAX_ASPECT_RATIO: Final = 200  # the limit of transformers' smart_resize


class GridProcessor(ImageProcessor):
    """``pixel_values [1, patches, values of a patch]`` -> T tokens, with their positions in the grid.

    Attributes:
        preprocessor: from pictures to patches.
    """

    def __init__(self, package: Package) -> None:
        manifest, layout = package.manifest, package.manifest.image.layout
        self._package = package
        assert isinstance(layout, GridLayout)  # by the table of kinds
        path = package.folder / "preprocessor_config.json"
        self.preprocessor = GridPreprocessor.from_file(path)
        expect(f"pixels of a token in {path}", self.preprocessor.token_pixels, layout.token_pixels)
        self.graphs = layout.vision_graphs
        self._grids = {grid.graph: grid for grid in layout.grids}
        self._counts = {graph: manifest.tokens_of(graph) for graph in self.graphs}
        for grid in layout.grids:
            expect(f"tokens of {grid.graph}", self._counts[grid.graph].num_tokens, grid.rows * grid.columns)
        self._policy = manifest.selection.config.policy

    def expected(self, graph: str) -> GraphRecord:
        """Return the tensors that fit a grid and its selection."""
        patches = self._counts[graph].num_tokens * self.preprocessor.group
        return expected_graph(self._package, graph, pixel_values=("float32", (patches, self.preprocessor.patch_values)))

    def view(self, image: Image, *, alone: bool = True) -> Image:
        """Return the image in the size of its grid."""
        return self._resize_to_grid(image, self._grid_for(image))

    def preprocess(self, image: Image, *, alone: bool = True) -> PreprocessedImage:
        """Return ``pixel_values [1, patches, values of a patch]`` for the grid of the image."""
        grid = self._grid_for(image)
        resized = self._resize_to_grid(image, grid)
        return PreprocessedImage(
            graph=grid.graph,
            feeds={"pixel_values": self.preprocessor.pixel_values(resized)},
            digest=hashlib.sha256(grid.graph.encode() + resized.tobytes()).digest(),
            num_placeholders=self._counts[grid.graph].keep_tokens,
        )

    def postprocess(self, outputs: Mapping[str, Array], image: PreprocessedImage) -> EncodedImage:
        """Return the T kept tokens."""
        grid = self._grids[image.graph]
        tokens = selected_tokens(outputs, 0, self._counts[image.graph])
        side = self.preprocessor.token_pixels
        box = TokenGrid(
            rows=grid.rows, columns=grid.columns, left=0, top=0, width=grid.columns * side, height=grid.rows * side
        )
        entropies = () if tokens.spectral_entropy is None else (tokens.spectral_entropy,)
        selection = TokenSelection((box,), tokens.indices, tokens.saliency_mask, entropies, self._policy)
        positions = grid_positions(tokens.indices, rows=grid.rows, columns=grid.columns)
        return EncodedImage(tokens.features, selection, positions)

    def num_placeholders(self, selection: TokenSelection) -> int:
        """Return T of the selection's grid; for a grid that this package lacks, the number of kept tokens."""
        shape = (selection.grids[0].rows, selection.grids[0].columns)
        known = {(grid.rows, grid.columns): self._counts[grid.graph].keep_tokens for grid in self._grids.values()}
        return known.get(shape, selection.keep_tokens)

    def _grid_for(self, image: Image) -> GridRecord:
        grids = list(self._grids.values())
        shapes = [(grid.rows, grid.columns) for grid in grids]
        return grids[choose_grid(image.height, image.width, shapes, self.preprocessor.pixels)]

    def _resize_to_grid(self, image: Image, grid: GridRecord) -> Image:
        return self.preprocessor.resized(image, rows=grid.rows, columns=grid.columns)


class _Qwen2VlFile(PixelFile, frozen=True):
    """The keys of ``preprocessor_config.json`` that are used; the defaults are Qwen2VLImageProcessor's."""

    image_processor_type: str = "Qwen2VLImageProcessor"
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    size: SizeDict = SizeDict(shortest_edge=56 * 56, longest_edge=28 * 28 * 1280)


@dataclass(frozen=True)
class GridPreprocessor:
    """Resizes, rescales and normalises pictures, and divides them into patches."""

    _config: _Qwen2VlFile
    _levels: npt.NDArray[np.float32]  # [3, 256]: the value of each 8-bit level per channel

    @classmethod
    def from_file(cls, path: Path) -> GridPreprocessor:
        """Read a ``preprocessor_config.json``.

        Raises:
            PackageError: it cannot be read, or needs something that is not supported.
        """
        config = read_pixel_file(path, _Qwen2VlFile)
        if min(config.patch_size, config.temporal_patch_size, config.merge_size) < 1 or not config.do_resize:
            raise PackageError(
                f"{path} has patch_size {config.patch_size}, temporal_patch_size {config.temporal_patch_size}, "
                f"merge_size {config.merge_size} and do_resize {config.do_resize}",
                expected="sizes of at least 1, and do_resize",
                fix="export again",
            )
        return cls(config, pixel_levels(config, path))

    @property
    def token_pixels(self) -> int:
        """Side of the square of pixels that becomes one token."""
        return self._config.patch_size * self._config.merge_size

    @property
    def pixels(self) -> PixelRange:
        """The sizes that transformers would resize pictures to."""
        size = self._config.size
        return PixelRange(side=self.token_pixels, least=size.shortest_edge or 0, most=size.longest_edge or sys.maxsize)

    @property
    def patch_values(self) -> int:
        """Number of values per patch: channels x times x pixels of a square."""
        return 3 * self._config.temporal_patch_size * self._config.patch_size**2

    @property
    def group(self) -> int:
        """Number of patches per token."""
        return self._config.merge_size**2

    def resized(self, image: Image, *, rows: int, columns: int) -> Image:
        """Return an RGB image in the size of a grid of tokens, 8 bits."""
        size = (columns * self.token_pixels, rows * self.token_pixels)
        return image.resize(size, resample=self._config.resample)

    def pixel_values(self, resized: Image) -> npt.NDArray[np.float32]:
        """Return the patches of a resized image, grouped by token: float32 [1, patches, patch_values]."""
        side, merge, times = self._config.patch_size, self._config.merge_size, self._config.temporal_patch_size
        pixels = np.asarray(resized)
        channels = normalize(pixels, self._levels)
        rows, columns = pixels.shape[0] // self.token_pixels, pixels.shape[1] // self.token_pixels
        # [channel, token row, patch row, pixel row], then the same for columns
        patches = channels.reshape(3, rows, merge, side, columns, merge, side).transpose(1, 4, 2, 5, 0, 3, 6)
        moving = np.repeat(patches[:, :, :, :, :, None], times, axis=5)  # a still image, repeated for all times
        return moving.reshape(1, rows * columns * self.group, self.patch_values)


@dataclass(frozen=True, kw_only=True)
class PixelRange:
    """The sizes that transformers' image processor resizes pictures to.

    Attributes:
        side: of the square of pixels that becomes one token.
        least, most: number of pixels of a picture.
    """

    side: int
    least: int
    most: int

    def shape_of(self, height: int, width: int) -> tuple[int, int] | None:
        """Return rows and columns of tokens for a picture, as ``smart_resize``; None if it refuses the picture."""
        if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
            return None
        rows, columns = round(height / self.side), round(width / self.side)
        area = rows * columns * self.side**2
        if area > self.most:
            shrink = math.sqrt(height * width / self.most) * self.side
            return max(1, math.floor(height / shrink)), max(1, math.floor(width / shrink))
        if area < self.least:
            grow = math.sqrt(self.least / (height * width)) / self.side
            return math.ceil(height * grow), math.ceil(width * grow)
        return rows, columns


def choose_grid(height: int, width: int, grids: Sequence[tuple[int, int]], pixels: PixelRange) -> int:
    """Return the index of the grid for a picture.

    It is the grid that transformers would choose, or else the one that distorts the picture least; among equals, the
    one nearest in size.

    Args:
        height, width: size of the picture, in pixels.
        grids: rows and columns of tokens of each grid.
        pixels: the sizes that transformers would choose from.
    """
    own = pixels.shape_of(height, width)
    if own in grids:
        return grids.index(own)

    def distance(grid: tuple[int, int]) -> tuple[float, float]:
        aspect = (grid[1] * height) / (grid[0] * width)
        area = (grid[0] * grid[1] * pixels.side**2) / (height * width)
        return abs(math.log(aspect)), abs(math.log(area))

    distances = [distance(grid) for grid in grids]
    return distances.index(min(distances))


def grid_positions(indices: npt.NDArray[np.int64], *, rows: int, columns: int) -> ImagePositions:
    """Return the positions of some tokens of a grid.

    Args:
        indices: int64 [T], in raster order of the grid.
        rows, columns: size of the grid.
    """
    row, column = np.divmod(indices, columns)
    return ImagePositions(np.stack([np.zeros_like(row), row, column]), max(rows, columns))
