"""A batch of crops per image, some of whose tokens are padding: LLaVA-NeXT and LLaVA-OneVision.

The model sees a picture twice: once stretched to one square crop (the overview), and once enlarged, with its
proportions, on the best fitting of the model's canvases, which is divided into crops. The area of the canvas around the
picture is padding; tokens that show only padding are omitted. The arithmetic, including rounding, is transformers'.

An image's tokens are numbered over two grids: first that of the overview, then that of the canvas without padding. The
selection runs once per crop; crops that are entirely padding are not run.

If all tokens are kept, the language model gets the same input as from transformers: the tokens of both grids in this
order, with ``image_newline`` after every row of the second. From a pruned package it gets the kept tokens without
newlines: in the order of the numbering (``order="spatial"``), or crop by crop as picked (``order="selection"``).

LLaVA-OneVision differs in two ways. If all tokens are kept, a large picture's tokens are shrunk to those of nine crops.
And if a prompt has several images, each is a single crop, padded to a square, with one newline at the end.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from promprune.errors import BackendError, PackageError
from promprune.inputs import read_file
from promprune.package.image import IMAGE_NEWLINE_FILE, AnyresLayout
from promprune.package.manifest import GraphRecord
from promprune.package.package import Package
from promprune.runtime.images.base import ImageProcessor, PreprocessedImage, expect, expected_graph, selected_tokens
from promprune.runtime.images.encoded import EncodedImage, TokenGrid, TokenSelection
from promprune.runtime.images.preprocess import PixelFile, SizeDict, normalize, pixel_levels, read_pixel_file
from promprune.runtime.sessions import Array

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "AnyresPreprocessor",
    "AnyresProcessor",
    "CanvasFit",
    "PreprocessedCrops",
    "fit_to_canvas",
    "image_token_indices",
    "token_grids",
    "view_of",
]

_PADDING: Final = -1
_MAX_NEWLINE_BYTES: Final = 1024 * 1024
_GAP: Final = 16  # pixels between the two grids in a view
_BACKGROUND: Final = (22, 24, 29)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreprocessedCrops(PreprocessedImage):
    """The inputs of the vision graph for the crops of one image.

    Attributes:
        token_indices: int64 [crops, N]; index of each token among all tokens of the image, -1 for padding.
        grids: the grids of the image's tokens.
        single: whether it is one crop only, because the prompt has several images.
    """

    token_indices: npt.NDArray[np.int64]
    grids: tuple[TokenGrid, ...]
    single: bool = False


class AnyresProcessor(ImageProcessor):
    """``pixel_values [crops, 3, side, side]``, ``token_mask [crops, N]`` -> up to T tokens of every crop.

    Attributes:
        preprocessor: from pictures to crops.
    """

    def __init__(self, package: Package) -> None:
        folder, manifest, layout = package.folder, package.manifest, package.manifest.image.layout
        self._package = package
        assert isinstance(layout, AnyresLayout)  # by the table of kinds
        for height, width in layout.canvases:
            expect("remainder of canvas / crop size", (height % layout.side, width % layout.side), (0, 0))
        expect("tokens per crop", layout.patches**2, manifest.tokens_of().num_tokens)
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

    def view(self, image: Image, *, alone: bool = True) -> Image:
        """Return the overview, and to its right the picture on the canvas without padding; or the single crop."""
        if self._layout.one_crop_each and not alone:
            return self.preprocessor.squared(image)
        fit = fit_to_canvas(image.height, image.width, self._layout)
        whole, canvas = self.preprocessor.whole(image), self.preprocessor.canvas(image, fit)
        return view_of(whole, canvas, fit, self._layout)

    def preprocess(self, image: Image, *, alone: bool = True) -> PreprocessedCrops:
        """Return the crops that are not entirely padding, with masks of their tokens."""
        if self._layout.one_crop_each and not alone:
            return self._preprocess_single(image)
        fit = fit_to_canvas(image.height, image.width, self._layout)
        whole, canvas = self.preprocessor.whole(image), self.preprocessor.canvas(image, fit)
        token_indices = image_token_indices(fit, self._layout)
        mask = token_indices != _PADDING
        used = mask.any(axis=1)
        feeds: dict[str, Array] = {"pixel_values": self.preprocessor.pixel_values([whole, canvas])[used]}
        if self._counts.is_pruned:
            feeds["token_mask"] = mask[used]
            placeholders = int(np.minimum(mask.sum(axis=1), self._counts.keep_tokens).sum())
        else:
            placeholders = self._num_placeholders(token_grids(fit, self._layout), single=False)
        digest = hashlib.sha256(repr(fit).encode())
        for picture in (whole, canvas):
            digest.update(picture.tobytes())
        return PreprocessedCrops(
            graph=self.graphs[0],
            feeds=feeds,
            digest=digest.digest(),
            num_placeholders=placeholders,
            token_indices=token_indices[used],
            grids=token_grids(fit, self._layout),
        )

    def _preprocess_single(self, image: Image) -> PreprocessedCrops:
        """Return an image as a single crop, all of whose tokens may be kept."""
        squared = self.preprocessor.squared(image)
        indices = np.arange(self._counts.num_tokens)[None]
        feeds: dict[str, Array] = {"pixel_values": self.preprocessor.pixel_values([squared])}
        if self._counts.is_pruned:
            feeds["token_mask"] = np.ones(indices.shape, bool)
        return PreprocessedCrops(
            graph=self.graphs[0],
            feeds=feeds,
            digest=hashlib.sha256(b"single" + squared.tobytes()).digest(),
            num_placeholders=self._counts.keep_tokens + (not self._counts.is_pruned),
            token_indices=indices,
            grids=(_overview(self._layout),),
            single=True,
        )

    def postprocess(self, outputs: Mapping[str, Array], image: PreprocessedImage) -> EncodedImage:
        """Return the kept tokens of all crops; with newlines if all tokens are kept."""
        assert isinstance(image, PreprocessedCrops)  # returned by ``preprocess``
        crops = [selected_tokens(outputs, row, self._counts) for row in range(len(image.token_indices))]
        chosen = [row[crop.indices] for row, crop in zip(image.token_indices, crops, strict=True)]
        real = [some != _PADDING for some in chosen]
        indices = np.concatenate([some[keep] for some, keep in zip(chosen, real, strict=True)])
        features = np.concatenate([crop.features[keep] for crop, keep in zip(crops, real, strict=True)])
        order = np.arange(len(indices)) if self._config.order == "selection" else np.argsort(indices)
        if not self._counts.is_pruned:
            selection = TokenSelection(image.grids, np.arange(len(indices)))
            return EncodedImage(self._with_newlines(features[np.argsort(indices)], image), selection)
        if len(indices) != image.num_placeholders:
            raise BackendError(
                f"the vision graph chose {len(indices)} tokens that are not padding",
                expected=f"{image.num_placeholders}",
                fix="export the package again",
            )
        saliency = [np.asarray(crop.saliency_mask)[keep] for crop, keep in zip(crops, real, strict=True)]
        entropies = tuple(crop.spectral_entropy for crop in crops if crop.spectral_entropy is not None)
        selection = TokenSelection(
            image.grids, indices[order], np.concatenate(saliency)[order], entropies, self._config.policy
        )
        return EncodedImage(features[order], selection)

    def num_placeholders(self, selection: TokenSelection) -> int:
        """Return the number of kept tokens plus newlines."""
        if self._counts.is_pruned:
            return selection.keep_tokens
        single = self._layout.one_crop_each and len(selection.grids) == 1
        return self._num_placeholders(selection.grids, single=single)

    def _num_placeholders(self, grids: Sequence[TokenGrid], *, single: bool) -> int:
        """Return the number of tokens of an image, including newlines, if all are kept."""
        whole, *shown = grids
        if not shown:
            return whole.num_tokens + single
        rows, columns = self._layout.shrunk(shown[0].rows, shown[0].columns)
        return whole.num_tokens + rows * (columns + 1)

    def _with_newlines(self, features: Array, image: PreprocessedCrops) -> Array:
        whole, *shown = image.grids
        newline = self._newline.astype(features.dtype)
        if not shown:
            return np.concatenate([features, newline[None]]) if image.single else features
        (grid,) = shown
        picture = features[whole.num_tokens :].reshape(grid.rows, grid.columns, features.shape[1])
        picture = resize_bilinearly(picture, *self._layout.shrunk(grid.rows, grid.columns))
        newlines = np.broadcast_to(newline, (len(picture), 1, len(newline)))
        rows = np.concatenate([picture, newlines], axis=1).reshape(-1, len(newline))
        return np.concatenate([features[: whole.num_tokens], rows])


def token_grids(fit: CanvasFit, layout: AnyresLayout) -> tuple[TokenGrid, ...]:
    """Return the grids of an image's tokens, side by side; without the second if it has no rows."""
    whole = _overview(layout)
    if not fit.rows:
        return (whole,)
    shown = TokenGrid(
        rows=len(fit.rows),
        columns=len(fit.columns),
        left=layout.side + _GAP,
        top=0,
        width=_pixels(len(fit.columns), layout),
        height=_pixels(len(fit.rows), layout),
    )
    return whole, shown


def _overview(layout: AnyresLayout) -> TokenGrid:
    return TokenGrid(rows=layout.patches, columns=layout.patches, left=0, top=0, width=layout.side, height=layout.side)


def resize_bilinearly(picture: Array, rows: int, columns: int) -> Array:
    """Resize features ``[H, W, D]`` to ``[rows, columns, D]`` like torch's bilinear ``interpolate``; same dtype."""
    if picture.shape[:2] == (rows, columns):
        return picture
    down, across = (_bilinear_weights(*sizes) for sizes in ((picture.shape[0], rows), (picture.shape[1], columns)))
    resized = np.einsum("rh,hwd->rwd", down, picture.astype(np.float32))
    wanted: Array = np.einsum("cw,rwd->rcd", across, resized).astype(picture.dtype)
    return wanted


def _bilinear_weights(size: int, wanted: int) -> npt.NDArray[np.float32]:
    """Return the weight of each of ``size`` samples in each of ``wanted`` samples: float32 [wanted, size]."""
    places = np.maximum((np.arange(wanted) + 0.5) * (size / wanted) - 0.5, 0)
    lower = places.astype(np.int64)
    weights = np.zeros((wanted, size))
    np.add.at(weights, (np.arange(wanted), lower), 1 - (places - lower))
    np.add.at(weights, (np.arange(wanted), np.minimum(lower + 1, size - 1)), places - lower)
    return weights.astype(np.float32)


def view_of(whole: Image, canvas: Image, fit: CanvasFit, layout: AnyresLayout) -> Image:
    """Return the overview of an image, and to its right the picture on the canvas without padding."""
    from PIL import Image as PILImage

    grids = token_grids(fit, layout)
    view = PILImage.new("RGB", _size_of(grids), _BACKGROUND)
    view.paste(whole, (0, 0))
    for grid in grids[1:]:
        top, left = (_pixels(tokens.start, layout) for tokens in (fit.rows, fit.columns))
        view.paste(canvas.crop((left, top, left + grid.width, top + grid.height)), (grid.left, grid.top))
    return view


def _pixels(tokens: int, layout: AnyresLayout) -> int:
    return tokens * layout.side // layout.patches


def image_token_indices(fit: CanvasFit, layout: AnyresLayout) -> npt.NDArray[np.int64]:
    """Return the index of every token of every crop among all tokens of the image: int64 [crops, N], -1 for padding.

    The tokens of the overview come first, then those of the canvas that are not padding, in raster order.
    """
    n = layout.patches
    rows, columns = fit.canvas[0] // layout.side, fit.canvas[1] // layout.side
    canvas = np.full((rows * n, columns * n), _PADDING, np.int64)
    shape = (len(fit.rows), len(fit.columns))
    inner = n * n + np.arange(shape[0] * shape[1]).reshape(shape)
    canvas[fit.rows.start : fit.rows.stop, fit.columns.start : fit.columns.stop] = inner
    crops = canvas.reshape(rows, n, columns, n).swapaxes(1, 2).reshape(-1, n * n)
    return np.concatenate([np.arange(n * n)[None], crops])


def _size_of(grids: tuple[TokenGrid, ...]) -> tuple[int, int]:
    """Return the width and height of a picture that contains all grids."""
    return max(grid.left + grid.width for grid in grids), max(grid.top + grid.height for grid in grids)


def _read_newline(path: Path) -> npt.NDArray[np.float32]:
    try:
        content = io.BytesIO(read_file(path, most_bytes=_MAX_NEWLINE_BYTES))
        newline: npt.NDArray[np.float32] = np.load(content, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, OverflowError) as error:
        raise PackageError(f"{path} is not a usable array ({error})", fix="export again") from error
    if newline.dtype != np.float32 or newline.ndim != 1 or not np.isfinite(newline).all():
        raise PackageError(
            f"{path} contains {newline.dtype}{list(newline.shape)}",
            expected="finite float32 [hidden size]",
            fix="export again",
        )
    return newline


class _LlavaNextFile(PixelFile, frozen=True):
    """The keys of ``preprocessor_config.json`` that are used; the defaults are LlavaNextImageProcessor's."""

    size: SizeDict = SizeDict(shortest_edge=224)
    do_center_crop: bool | None = True
    crop_size: SizeDict | None = SizeDict(height=224, width=224)
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class CanvasFit:
    """The position of a picture on its canvas.

    Attributes:
        canvas: height and width, in pixels.
        resized: height and width of the picture on it, in pixels.
        top, left: offset of the picture, in pixels.
        rows, columns: the rows and columns of the canvas's tokens that are not padding.
    """

    canvas: tuple[int, int]
    resized: tuple[int, int]
    top: int
    left: int
    rows: range
    columns: range


def fit_to_canvas(height: int, width: int, layout: AnyresLayout) -> CanvasFit:
    """Place a picture of ``height`` x ``width`` pixels on the best canvas."""
    canvas = _best_canvas(height, width, layout.canvases)
    resized = _fit_size(height, width, canvas)
    grid = (canvas[0] // layout.side * layout.patches, canvas[1] // layout.side * layout.patches)
    rows, columns = _tokens_of_picture(height, width, grid)
    return CanvasFit(
        canvas=canvas,
        resized=resized,
        top=(canvas[0] - resized[0]) // 2,
        left=(canvas[1] - resized[1]) // 2,
        rows=rows,
        columns=columns,
    )


@dataclass(frozen=True)
class AnyresPreprocessor:
    """Resizes, places, crops, rescales and normalises pictures."""

    _config: _LlavaNextFile
    _side: int
    _levels: npt.NDArray[np.float32]  # [3, 256]: the value of each 8-bit level per channel

    @classmethod
    def from_file(cls, path: Path, layout: AnyresLayout) -> AnyresPreprocessor:
        """Read a ``preprocessor_config.json``.

        Raises:
            PackageError: it cannot be read, needs something that is not supported, or makes other crops than those of
                ``layout``.
        """
        config = read_pixel_file(path, _LlavaNextFile)
        size = config.size
        square = (size.height, size.width) if size.height and size.width else (size.shortest_edge, size.shortest_edge)
        cropped = config.crop_size if config.do_center_crop else None
        crop = (cropped.height, cropped.width) if cropped else square
        if not config.do_resize or not square == crop == (layout.side, layout.side):
            raise PackageError(
                f"{path} makes crops of {crop[0]} x {crop[1]} pixels from pictures of {square[0]} x {square[1]}",
                expected=f"do_resize, and {layout.side} x {layout.side} for both, the input size of the vision graph",
                fix="export again",
            )
        if config.image_grid_pinpoints != layout.canvases:
            raise PackageError(
                f"{path} has other image_grid_pinpoints than the manifest", expected="the same", fix="export again"
            )
        return cls(config, layout.side, pixel_levels(config, path))

    def whole(self, image: Image) -> Image:
        """Return an RGB picture stretched to one crop, 8 bits."""
        return image.resize((self._side, self._side), resample=self._config.resample)

    def squared(self, image: Image) -> Image:
        """Return an RGB picture in the middle of a square of the mean colour, as one crop, 8 bits."""
        from PIL import Image as PILImage

        longest = max(image.size)
        square = PILImage.new("RGB", (longest, longest), tuple(int(level * 255) for level in self._config.image_mean))
        square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
        return self.whole(square)

    def canvas(self, image: Image, fit: CanvasFit) -> Image:
        """Return an RGB picture on its canvas, 8 bits."""
        from PIL import Image as PILImage

        height, width = fit.resized
        canvas = PILImage.new("RGB", fit.canvas[::-1])
        canvas.paste(image.resize((width, height), resample=self._config.resample), (fit.left, fit.top))
        return canvas

    def pixel_values(self, pictures: Sequence[Image]) -> npt.NDArray[np.float32]:
        """Return the crops of pictures, in raster order: float32 [crops, 3, side, side]."""
        pixels = np.concatenate([self._cut(np.asarray(picture)) for picture in pictures])
        return normalize(pixels, self._levels, axis=1)

    def _cut(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        side = self._side
        rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
        return pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)


def _best_canvas(height: int, width: int, canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the canvas on which the picture has most pixels; among equals, the one with least padding, then the first.

    Pixels that are added by enlarging do not count.
    """

    def rank(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return -used, canvas[0] * canvas[1] - used

    return min(canvases, key=rank)


def _fit_size(height: int, width: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of a picture that is scaled to fill one side of a canvas."""
    scale_width, scale_height = canvas[1] / width, canvas[0] / height
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * scale_height), canvas[1])


def _tokens_of_picture(height: int, width: int, grid: tuple[int, int]) -> tuple[range, range]:
    """Return the rows and columns of a grid of tokens that are not padding, computed as in transformers.

    They are empty if the picture is so long that its height or width is less than a token.
    """
    rows, columns = grid
    if width / height > columns / rows:
        left = int(round(height * (columns / width), 7))
        padding = (rows - left) // 2
        return range(padding, rows - padding), range(columns)
    left = int(round(width * (rows / height), 7))
    padding = (columns - left) // 2
    return range(rows), range(padding, columns - padding)
