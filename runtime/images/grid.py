"""One of several sizes for every image, each with a vision graph: Qwen2-VL and Qwen2.5-VL.

A picture of any size is resized to one of the grids that a package has graphs for. If that is the size that
``smart_resize`` would have chosen, the patches are equal to those of transformers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from promprune.errors import PackageError
from promprune.package.image import GridLayout, GridRecord
from promprune.package.manifest import GraphRecord
from promprune.package.package import Package
from promprune.runtime.images.base import ImageProcessor, PreprocessedImage, expect, expected_graph, selected_tokens
from promprune.runtime.images.encoded import EncodedImage, TokenGrid, TokenSelection
from promprune.runtime.images.positions import ImagePositions
from promprune.runtime.images.preprocess import PixelFile, normalize, pixel_levels, read_pixel_file
from promprune.runtime.sessions import Array

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["GridPreprocessor", "GridProcessor", "closest_shape", "grid_positions"]


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

    def view(self, image: Image) -> Image:
        """Return the image in the size of its grid."""
        return self._resize_to_grid(image, self._grid_for(image))

    def preprocess(self, image: Image) -> PreprocessedImage:
        """Return ``pixel_values [1, patches, values of a patch]`` for the grid that distorts the image least."""
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
        grids, side = list(self._grids.values()), self.preprocessor.token_pixels
        sizes = [(grid.rows * side, grid.columns * side) for grid in grids]
        return grids[closest_shape(image.height, image.width, sizes)]

    def _resize_to_grid(self, image: Image, grid: GridRecord) -> Image:
        return self.preprocessor.resized(image, rows=grid.rows, columns=grid.columns)


class _Qwen2VlFile(PixelFile, frozen=True):
    """The keys of ``preprocessor_config.json`` that are used; the defaults are Qwen2VLImageProcessor's."""

    image_processor_type: str = "Qwen2VLImageProcessor"
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2


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


def closest_shape(height: int, width: int, grids: Iterable[tuple[int, int]]) -> int:
    """Return the index of the grid that distorts a picture least; among equals, of the one nearest in size.

    Args:
        height, width: size of the picture, in pixels.
        grids: height and width of each grid, in pixels.
    """

    def distance(grid: tuple[int, int]) -> tuple[float, float]:
        aspect = (grid[1] * height) / (grid[0] * width)
        area = (grid[0] * grid[1]) / (height * width)
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
