"""One of several sizes for every image, each with a vision graph: Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from promprune.errors import PackageError
from promprune.package.image import GridLayout, GridRecord
from promprune.package.manifest import Manifest, SelectionRecord
from promprune.runtime.images.base import ImageLayout, PreparedImage, expect, expect_graph, selected_tokens
from promprune.runtime.images.encoded import EncodedImage, TokenGrid, TokenSelection
from promprune.runtime.images.patches import PatchPreprocessor, closest_shape
from promprune.runtime.images.positions import grid_positions
from promprune.runtime.sessions import Array, Session

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Grids"]


class Grids(ImageLayout):
    """``pixel_values [1, patches, values of a patch]`` -> T tokens, with their places in the grid.

    Attributes:
        preprocessor: from pictures to patches.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        layout = manifest.image.layout
        assert isinstance(layout, GridLayout)  # as the table says
        path = folder / "preprocessor_config.json"
        self.preprocessor = PatchPreprocessor.from_file(path)
        expect(f"pixels of a token in {path}", self.preprocessor.token_pixels, layout.token_pixels)
        self.graphs = tuple(grid.graph for grid in layout.grids)
        self._grids = {grid.graph: grid for grid in layout.grids}
        self._selections = {grid.graph: _selection(manifest, grid) for grid in layout.grids}

    def check(self, graph: str, session: Session) -> None:
        """Compare a vision graph with its grid and its selection."""
        patches = self._selections[graph].num_tokens * self.preprocessor.group
        expect_graph(session, self._selections[graph], {"pixel_values": (patches, self.preprocessor.patch_values)})

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
            num_placeholders=self._selections[grid.graph].keep_tokens,
        )

    def pack(self, outputs: Mapping[str, Array], prepared: PreparedImage) -> EncodedImage:
        """Return the T kept tokens."""
        grid, record = self._grids[prepared.graph], self._selections[prepared.graph]
        tokens = selected_tokens(outputs, 0, record)
        side = self.preprocessor.token_pixels
        box = TokenGrid(
            rows=grid.rows, columns=grid.columns, left=0, top=0, width=grid.columns * side, height=grid.rows * side
        )
        entropies = () if tokens.spectral_entropy is None else (tokens.spectral_entropy,)
        selection = TokenSelection((box,), tokens.indices, tokens.saliency_mask, entropies, record.policy)
        positions = grid_positions(tokens.indices, rows=grid.rows, columns=grid.columns)
        return EncodedImage(tokens.features, selection, positions)

    def num_placeholders(self, selection: TokenSelection) -> int:
        """Return the T of the selection's grid; an image of a grid that this package has not keeps its own."""
        shape = (selection.grids[0].rows, selection.grids[0].columns)
        known = {(grid.rows, grid.columns): self._selections[grid.graph].keep_tokens for grid in self._grids.values()}
        return known.get(shape, selection.keep_tokens)

    def _grid_for(self, image: Image) -> GridRecord:
        grids, side = list(self._grids.values()), self.preprocessor.token_pixels
        sizes = [(grid.rows * side, grid.columns * side) for grid in grids]
        return grids[closest_shape(image.height, image.width, sizes)]

    def _resized(self, image: Image, grid: GridRecord) -> Image:
        return self.preprocessor.resized(image, rows=grid.rows, columns=grid.columns)


def _selection(manifest: Manifest, grid: GridRecord) -> SelectionRecord:
    """Return the selection of one grid, whose T is what its graph returns."""
    graph = manifest.graphs.get(grid.graph)
    features = next((output for output in graph.outputs if output.name == "image_features"), None) if graph else None
    keep_tokens = features.shape[1] if features and len(features.shape) == 3 else None
    if not isinstance(keep_tokens, int):
        raise PackageError(
            f"the package has no graph {grid.graph!r} with a fixed number of image features",
            expected=f"one for images of {grid.rows} x {grid.columns} tokens",
            fix="export the package again",
        )
    return msgspec.structs.replace(manifest.selection, num_tokens=grid.rows * grid.columns, keep_tokens=keep_tokens)
