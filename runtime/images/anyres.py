"""A batch of crops per image, of which some tokens are padding: LLaVA-NeXT.

An image's tokens are counted over two grids: that of the crop that shows it whole, then that of its canvas without the
padding. The selection runs once for every crop; a crop that shows nothing but padding is not run at all.

With nothing removed, the language model gets what transformers gives it: the tokens of both grids in this order, and
``image_newline`` behind every row of the second. From a pruned package it gets the kept tokens without newlines: in
the order of this count (``order="spatial"``), or crop by crop as they were picked (``order="selection"``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from promprune.errors import BackendError, PackageError
from promprune.package.image import IMAGE_NEWLINE_FILE, AnyresLayout
from promprune.package.manifest import GraphRecord
from promprune.package.package import Package
from promprune.runtime.images.anyres_geometry import AnyresPreprocessor, Placement, place
from promprune.runtime.images.base import ImageLayout, PreparedImage, expect, expected_graph, selected_tokens
from promprune.runtime.images.encoded import EncodedImage, TokenGrid, TokenSelection
from promprune.runtime.sessions import Array

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Anyres", "PreparedCrops", "token_grids", "token_places", "view_of"]

_PADDING: Final = -1
_GAP: Final = 16  # pixels between the two grids in a view
_BACKGROUND: Final = (22, 24, 29)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedCrops(PreparedImage):
    """Crops that are ready for the vision graph.

    Attributes:
        places: int64 [crops, N]; where each token comes in the count of the image's tokens, -1 for padding.
        grids: of the image's tokens.
    """

    places: npt.NDArray[np.int64]
    grids: tuple[TokenGrid, ...]


class Anyres(ImageLayout):
    """``pixel_values [crops, 3, side, side]``, ``token_mask [crops, N]`` -> up to T tokens of every crop.

    Attributes:
        preprocessor: from pictures to crops.
    """

    def __init__(self, package: Package) -> None:
        folder, manifest, layout = package.folder, package.manifest, package.manifest.image.layout
        self._package = package
        assert isinstance(layout, AnyresLayout)  # as the table says
        for height, width in layout.canvases:
            expect("canvases that are no multiple of a crop", (height % layout.side, width % layout.side), (0, 0))
        expect("tokens of a crop", layout.patches**2, manifest.tokens_of().num_tokens)
        self.preprocessor = AnyresPreprocessor.from_file(folder / "preprocessor_config.json", layout)
        self._layout = layout
        self._counts = manifest.tokens_of()
        self._config = manifest.selection.config
        self._newline = _read_newline(folder / IMAGE_NEWLINE_FILE)

    def expected(self, graph: str) -> GraphRecord:
        """Return the tensors that fit the preprocessing, the selection and ``image_newline``."""
        inputs: dict[str, tuple[str, tuple[int, ...]]] = {
            "pixel_values": ("float32", (3, self._layout.side, self._layout.side))
        }
        if self._counts.is_pruned:
            inputs["token_mask"] = ("bool", (self._counts.num_tokens,))
        return expected_graph(self._package, graph, width=len(self._newline), **inputs)

    def view(self, image: Image) -> Image:
        """Return the whole crop, and at its right what the other crops show besides padding."""
        placement = place(image.height, image.width, self._layout)
        whole, canvas = self.preprocessor.whole(image), self.preprocessor.canvas(image, placement)
        return view_of(whole, canvas, placement, self._layout)

    def prepare(self, image: Image) -> PreparedCrops:
        """Return the crops that show something of the image, and which of their tokens do."""
        placement = place(image.height, image.width, self._layout)
        whole, canvas = self.preprocessor.whole(image), self.preprocessor.canvas(image, placement)
        places = token_places(placement, self._layout)
        mask = places != _PADDING
        used = mask.any(axis=1)
        feeds: dict[str, Array] = {"pixel_values": self.preprocessor.pixel_values([whole, canvas])[used]}
        if self._counts.is_pruned:
            feeds["token_mask"] = mask[used]
            placeholders = int(np.minimum(mask.sum(axis=1), self._counts.keep_tokens).sum())
        else:
            placeholders = int(mask.sum()) + len(placement.rows)
        digest = hashlib.sha256(repr(placement).encode())
        for picture in (whole, canvas):
            digest.update(picture.tobytes())
        return PreparedCrops(
            graph=self.graphs[0],
            feeds=feeds,
            digest=digest.digest(),
            num_placeholders=placeholders,
            places=places[used],
            grids=token_grids(placement, self._layout),
        )

    def pack(self, outputs: Mapping[str, Array], prepared: PreparedImage) -> EncodedImage:
        """Return the kept tokens of all crops; with nothing removed, the newlines too."""
        assert isinstance(prepared, PreparedCrops)  # as ``prepare`` returned it
        crops = [selected_tokens(outputs, row, self._counts) for row in range(len(prepared.places))]
        places = [row[crop.indices] for row, crop in zip(prepared.places, crops, strict=True)]
        real = [place != _PADDING for place in places]
        indices = np.concatenate([place[keep] for place, keep in zip(places, real, strict=True)])
        features = np.concatenate([crop.features[keep] for crop, keep in zip(crops, real, strict=True)])
        order = np.arange(len(indices)) if self._config.order == "selection" else np.argsort(indices)
        if not self._counts.is_pruned:
            selection = TokenSelection(prepared.grids, np.arange(len(indices)))
            return EncodedImage(self._with_newlines(features[np.argsort(indices)], prepared), selection)
        if len(indices) != prepared.num_placeholders:
            raise BackendError(
                f"the vision graph chose {len(indices)} tokens that are not padding",
                expected=f"{prepared.num_placeholders}",
                fix="export the package again",
            )
        saliency = [np.asarray(crop.saliency_mask)[keep] for crop, keep in zip(crops, real, strict=True)]
        entropies = tuple(crop.spectral_entropy for crop in crops if crop.spectral_entropy is not None)
        selection = TokenSelection(
            prepared.grids, indices[order], np.concatenate(saliency)[order], entropies, self._config.policy
        )
        return EncodedImage(features[order], selection)

    def num_placeholders(self, selection: TokenSelection) -> int:
        """Return the number of kept tokens, and of newlines."""
        newlines = 0 if self._counts.is_pruned else sum(grid.rows for grid in selection.grids[1:])
        return selection.keep_tokens + newlines

    def _with_newlines(self, features: Array, prepared: PreparedCrops) -> Array:
        whole, *shown = prepared.grids
        parts = [features[: whole.num_tokens]]
        for grid in shown:
            rows = features[whole.num_tokens :].reshape(grid.rows, grid.columns, features.shape[1])
            newlines = np.broadcast_to(self._newline.astype(features.dtype), (grid.rows, 1, features.shape[1]))
            parts.append(np.concatenate([rows, newlines], axis=1).reshape(-1, features.shape[1]))
        return np.concatenate(parts)


def token_grids(placement: Placement, layout: AnyresLayout) -> tuple[TokenGrid, ...]:
    """Return the grids in which an image's tokens are counted, placed side by side; the second where it has rows."""
    side, patches = layout.side, layout.patches
    whole = TokenGrid(rows=patches, columns=patches, left=0, top=0, width=side, height=side)
    if not placement.rows:
        return (whole,)
    shown = TokenGrid(
        rows=len(placement.rows),
        columns=len(placement.columns),
        left=side + _GAP,
        top=0,
        width=_pixels(len(placement.columns), layout),
        height=_pixels(len(placement.rows), layout),
    )
    return whole, shown


def view_of(whole: Image, canvas: Image, placement: Placement, layout: AnyresLayout) -> Image:
    """Return the crop that shows an image whole, and at its right what its canvas shows besides padding."""
    from PIL import Image as PILImage

    grids = token_grids(placement, layout)
    view = PILImage.new("RGB", _size_of(grids), _BACKGROUND)
    view.paste(whole, (0, 0))
    for grid in grids[1:]:
        top, left = (_pixels(tokens.start, layout) for tokens in (placement.rows, placement.columns))
        view.paste(canvas.crop((left, top, left + grid.width, top + grid.height)), (grid.left, grid.top))
    return view


def _pixels(tokens: int, layout: AnyresLayout) -> int:
    return tokens * layout.side // layout.patches


def token_places(placement: Placement, layout: AnyresLayout) -> npt.NDArray[np.int64]:
    """Return the place of every token of every crop in the count of the image's tokens: int64 [crops, N], -1: padding.

    The tokens of the whole crop come first, then those of the canvas that are not padding, in raster order.
    """
    n = layout.patches
    rows, columns = placement.canvas[0] // layout.side, placement.canvas[1] // layout.side
    canvas = np.full((rows * n, columns * n), _PADDING, np.int64)
    shape = (len(placement.rows), len(placement.columns))
    inner = n * n + np.arange(shape[0] * shape[1]).reshape(shape)
    canvas[placement.rows.start : placement.rows.stop, placement.columns.start : placement.columns.stop] = inner
    crops = canvas.reshape(rows, n, columns, n).swapaxes(1, 2).reshape(-1, n * n)
    return np.concatenate([np.arange(n * n)[None], crops])


def _size_of(grids: tuple[TokenGrid, ...]) -> tuple[int, int]:
    """Width and height of a picture that has room for all grids."""
    return max(grid.left + grid.width for grid in grids), max(grid.top + grid.height for grid in grids)


def _read_newline(path: Path) -> npt.NDArray[np.float32]:
    try:
        newline: npt.NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PackageError(f"{path} is not a usable array ({error})", fix="export again") from error
    if newline.dtype != np.float32 or newline.ndim != 1 or not np.isfinite(newline).all():
        raise PackageError(
            f"{path} holds {newline.dtype}{list(newline.shape)}",
            expected="finite float32 [hidden size]",
            fix="export again",
        )
    return newline
