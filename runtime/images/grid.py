"""One of several sizes for every image, each with a vision graph: Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from promprune.package.image import GridLayout, GridRecord
from promprune.package.manifest import GraphRecord
from promprune.package.package import Package
from promprune.runtime.images.base import ImageLayout, PreparedImage, expect, expected_graph, selected_tokens
from promprune.runtime.images.encoded import EncodedImage, TokenGrid, TokenSelection
from promprune.runtime.images.patches import PatchPreprocessor, closest_shape
from promprune.runtime.images.positions import grid_positions
from promprune.runtime.sessions import Array

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Grids"]


class Grids(ImageLayout):
    """``pixel_values [1, patches, values of a patch]`` -> T tokens, with their places in the grid.

    Attributes:
        preprocessor: from pictures to patches.
    """

    def __init__(self, package: Package) -> None:
        manifest, layout = package.manifest, package.manifest.image.layout
        self._package = package
        assert isinstance(layout, GridLayout)  # as the table says
        path = package.folder / "preprocessor_config.json"
        self.preprocessor = PatchPreprocessor.from_file(path)
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
        return self._resized(image, self._grid_for(image))

    def prepare(self, image: Image) -> PreparedImage:
        """Return ``pixel_values [1, patches, values of a patch]`` for the grid that distorts the image least."""
        grid = self._grid_for(image)
        resized = self._resized(image, grid)
        return PreparedImage(
            graph=grid.graph,
            feeds={"pixel_values": self.preprocessor.pixel_values(resized)},
            digest=hashlib.sha256(grid.graph.encode() + resized.tobytes()).digest(),
            num_placeholders=self._counts[grid.graph].keep_tokens,
        )

    def pack(self, outputs: Mapping[str, Array], prepared: PreparedImage) -> EncodedImage:
        """Return the T kept tokens."""
        grid = self._grids[prepared.graph]
        tokens = selected_tokens(outputs, 0, self._counts[prepared.graph])
        side = self.preprocessor.token_pixels
        box = TokenGrid(
            rows=grid.rows, columns=grid.columns, left=0, top=0, width=grid.columns * side, height=grid.rows * side
        )
        entropies = () if tokens.spectral_entropy is None else (tokens.spectral_entropy,)
        selection = TokenSelection((box,), tokens.indices, tokens.saliency_mask, entropies, self._policy)
        positions = grid_positions(tokens.indices, rows=grid.rows, columns=grid.columns)
        return EncodedImage(tokens.features, selection, positions)

    def num_placeholders(self, selection: TokenSelection) -> int:
        """Return the T of the selection's grid; an image of a grid that this package has not keeps its own."""
        shape = (selection.grids[0].rows, selection.grids[0].columns)
        known = {(grid.rows, grid.columns): self._counts[grid.graph].keep_tokens for grid in self._grids.values()}
        return known.get(shape, selection.keep_tokens)

    def _grid_for(self, image: Image) -> GridRecord:
        grids, side = list(self._grids.values()), self.preprocessor.token_pixels
        sizes = [(grid.rows * side, grid.columns * side) for grid in grids]
        return grids[closest_shape(image.height, image.width, sizes)]

    def _resized(self, image: Image, grid: GridRecord) -> Image:
        return self.preprocessor.resized(image, rows=grid.rows, columns=grid.columns)
