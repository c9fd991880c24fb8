"""One crop of a fixed size per image: LLaVA-1.5."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from promprune.package.image import CropLayout
from promprune.package.manifest import GraphRecord
from promprune.package.package import Package
from promprune.runtime.images.base import ImageLayout, PreparedImage, expect, expected_graph, selected_tokens
from promprune.runtime.images.encoded import EncodedImage, TokenGrid, TokenSelection
from promprune.runtime.images.preprocess import ImagePreprocessor
from promprune.runtime.sessions import Array

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Crop"]


class Crop(ImageLayout):
    """``pixel_values [1, 3, height, width]`` -> T tokens.

    Attributes:
        preprocessor: from pictures to ``pixel_values``.
    """

    def __init__(self, package: Package) -> None:
        manifest, layout = package.manifest, package.manifest.image.layout
        self._package = package
        assert isinstance(layout, CropLayout)  # as the table says
        self.preprocessor = ImagePreprocessor.from_file(
            package.folder / "preprocessor_config.json", height=layout.height, width=layout.width
        )
        self._counts = manifest.tokens_of()
        self._policy = manifest.selection.config.policy
        self._grid = TokenGrid(
            rows=layout.patch_rows,
            columns=layout.patch_columns,
            left=0,
            top=0,
            width=layout.width // layout.patch_columns * layout.patch_columns,  # what fills no patch is not seen
            height=layout.height // layout.patch_rows * layout.patch_rows,
        )
        expect("patches", self._grid.num_tokens, self._counts.num_tokens)

    def expected(self, graph: str) -> GraphRecord:
        """Return the tensors that fit the preprocessing and the selection."""
        pixels = (3, self.preprocessor.height, self.preprocessor.width)
        return expected_graph(self._package, graph, pixel_values=("float32", pixels))

    def view(self, image: Image) -> Image:
        """Return the part of the crop that patches are made of."""
        return self.preprocessor.crop(image).crop((0, 0, self._grid.width, self._grid.height))

    def prepare(self, image: Image) -> PreparedImage:
        """Return ``pixel_values [1, 3, height, width]``."""
        crop = self.preprocessor.crop(image)
        return PreparedImage(
            graph=self.graphs[0],
            feeds={"pixel_values": self.preprocessor.pixel_values(crop)},
            digest=hashlib.sha256(crop.tobytes()).digest(),
            num_placeholders=self._counts.keep_tokens,
        )

    def pack(self, outputs: Mapping[str, Array], prepared: PreparedImage) -> EncodedImage:
        """Return the T kept tokens."""
        tokens = selected_tokens(outputs, 0, self._counts)
        entropies = () if tokens.spectral_entropy is None else (tokens.spectral_entropy,)
        selection = TokenSelection((self._grid,), tokens.indices, tokens.saliency_mask, entropies, self._policy)
        return EncodedImage(tokens.features, selection)

    def num_placeholders(self, selection: TokenSelection) -> int:
        """Return T."""
        return self._counts.keep_tokens
