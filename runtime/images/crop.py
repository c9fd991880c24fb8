"""One crop of a fixed size per image, preprocessed like CLIP and LLaVA image processors: LLaVA-1.5."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from promprune.errors import PackageError
from promprune.package.image import CropLayout
from promprune.package.manifest import GraphRecord
from promprune.package.package import Package
from promprune.runtime.images.base import ImageProcessor, PreprocessedImage, expect, expected_graph, selected_tokens
from promprune.runtime.images.encoded import EncodedImage, TokenGrid, TokenSelection
from promprune.runtime.images.preprocess import (
    Channels,
    PixelFile,
    Pixels,
    Size,
    SizeDict,
    normalize,
    pixel_levels,
    read_pixel_file,
)
from promprune.runtime.sessions import Array

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CropPreprocessor", "CropProcessor"]

_FILTER_REACH: Final = 4  # radius of all filters, in output or input pixels, whichever are larger
_LARGE_PIXELS: Final = 16_000_000  # of a larger resized image, only the part that the crop needs is computed
_LARGE_SIDE: Final = 8192  # pixels; longer images are reduced before they are padded to a square


class CropProcessor(ImageProcessor):
    """``pixel_values [1, 3, height, width]`` -> T tokens.

    Attributes:
        preprocessor: from pictures to ``pixel_values``.
    """

    def __init__(self, package: Package) -> None:
        manifest, layout = package.manifest, package.manifest.image.layout
        self._package = package
        assert isinstance(layout, CropLayout)  # by the table of kinds
        self.preprocessor = CropPreprocessor.from_file(
            package.folder / "preprocessor_config.json", height=layout.height, width=layout.width
        )
        self._counts = manifest.tokens_of()
        self._policy = manifest.selection.config.policy
        self._grid = TokenGrid(
            rows=layout.patch_rows,
            columns=layout.patch_columns,
            left=0,
            top=0,
            width=layout.width // layout.patch_columns * layout.patch_columns,  # without incomplete patches
            height=layout.height // layout.patch_rows * layout.patch_rows,
        )
        expect("patches", self._grid.num_tokens, self._counts.num_tokens)

    def expected(self, graph: str) -> GraphRecord:
        """Return the tensors that fit the preprocessing and the selection."""
        pixels = (3, self.preprocessor.height, self.preprocessor.width)
        return expected_graph(self._package, graph, pixel_values=("float32", pixels))

    def view(self, image: Image, *, alone: bool = True) -> Image:
        """Return the part of the crop that is divided into patches."""
        return self.preprocessor.crop(image).crop((0, 0, self._grid.width, self._grid.height))

    def preprocess(self, image: Image, *, alone: bool = True) -> PreprocessedImage:
        """Return ``pixel_values [1, 3, height, width]``."""
        crop = self.preprocessor.crop(image)
        return PreprocessedImage(
            graph=self.graphs[0],
            feeds={"pixel_values": self.preprocessor.pixel_values(crop)},
            digest=hashlib.sha256(crop.tobytes()).digest(),
            num_placeholders=self._counts.keep_tokens,
        )

    def postprocess(self, outputs: Mapping[str, Array], image: PreprocessedImage) -> EncodedImage:
        """Return the T kept tokens."""
        tokens = selected_tokens(outputs, 0, self._counts)
        entropies = () if tokens.spectral_entropy is None else (tokens.spectral_entropy,)
        selection = TokenSelection((self._grid,), tokens.indices, tokens.saliency_mask, entropies, self._policy)
        return EncodedImage(tokens.features, selection)

    def num_placeholders(self, selection: TokenSelection) -> int:
        """Return T."""
        return self._counts.keep_tokens


class _ClipFile(PixelFile, frozen=True):
    """The keys of ``preprocessor_config.json`` that are used; the defaults are CLIPImageProcessor's."""

    image_processor_type: str = "CLIPImageProcessor"
    size: SizeDict | Size = SizeDict(shortest_edge=224)
    do_center_crop: bool = True
    crop_size: SizeDict | Size = SizeDict(height=224, width=224)
    do_pad: bool | None = None


@dataclass(frozen=True)
class CropPreprocessor:
    """Resizes, crops, rescales and normalises pictures.

    Attributes:
        height, width: size of the crop, in pixels.
    """

    height: int
    width: int
    _config: _ClipFile
    _levels: npt.NDArray[np.float32]  # [3, 256]: the value of each 8-bit level per channel

    @classmethod
    def from_file(cls, path: Path, *, height: int, width: int) -> CropPreprocessor:
        """Read a ``preprocessor_config.json``.

        Args:
            path: the file.
            height, width: input size of the vision graph, in pixels; the file must result in it.

        Raises:
            PackageError: it cannot be read, needs something that is not supported, or results in another size.
        """
        config = read_pixel_file(path, _ClipFile)
        final = _final_size(config, path)
        if final != (height, width):
            raise PackageError(
                f"{path} makes images of {final[0]} x {final[1]} pixels",
                expected=f"{height} x {width}, the input size of the vision graph",
                fix="export again",
            )
        return cls(height, width, config, pixel_levels(config, path))

    def crop(self, image: Image) -> Image:
        """Return the part of an RGB image that the model sees, ``height`` x ``width`` pixels, 8 bits."""
        from PIL import Image as PILImage

        if self._config.do_pad:
            image = _pad_to_square(image, self._config.image_mean)
        if self._config.do_resize:
            image = self._resize(image)
        if self._config.do_center_crop:
            image = PILImage.fromarray(_center_crop(np.asarray(image), self.height, self.width))
        return image

    def pixel_values(self, crop: Image) -> npt.NDArray[np.float32]:
        """Return the input of the vision graph for one cropped image: float32 [1, 3, height, width]."""
        return normalize(np.asarray(crop), self._levels)[None]

    def __call__(self, image: Image) -> npt.NDArray[np.float32]:
        """Return ``pixel_values(crop(image))``: float32 [1, 3, height, width]."""
        return self.pixel_values(self.crop(image))

    def _resize(self, image: Image) -> Image:
        height, width = _resized_size(self._config, image.height, image.width)
        if self._config.do_center_crop and height * width > _LARGE_PIXELS:
            return self._resize_middle(image, height, width)
        return image.resize((width, height), resample=self._config.resample)

    def _resize_middle(self, image: Image, height: int, width: int) -> Image:
        """Resize only the part of a very long image that the crop keeps: the entire one could exceed the memory.

        The result differs by at most one level (1/255) from resizing everything, except for noise on which the filter
        overshoots: there the order of Pillow's two passes matters, which depends on the sizes.
        """
        x0, x1 = _window(width, self.width, image.width)
        y0, y1 = _window(height, self.height, image.height)
        box = (
            x0 * image.width / width,
            y0 * image.height / height,
            x1 * image.width / width,
            y1 * image.height / height,
        )
        return image.resize((x1 - x0, y1 - y0), resample=self._config.resample, box=box)


def _final_size(config: _ClipFile, path: Path) -> tuple[int, int]:
    if config.do_pad and not config.image_processor_type.startswith("Llava"):
        raise PackageError(f"{path} has do_pad with {config.image_processor_type}", expected="do_pad off")
    size = config.crop_size if config.do_center_crop else config.size
    fixed = (size, size) if isinstance(size, int) and config.do_center_crop else None
    if isinstance(size, SizeDict) and size.height and size.width:
        fixed = (size.height, size.width)
    if fixed is None or not (config.do_center_crop or config.do_resize):
        raise PackageError(f"{path} has no fixed size", expected="crop_size, or size with height and width")
    if config.do_resize and isinstance(config.size, SizeDict):
        known = config.size.shortest_edge or (config.size.height and config.size.width)
        if not known or config.size.longest_edge:
            raise PackageError(f"{path} has size {config.size}", expected="shortest_edge, or height and width")
    return fixed


def _resized_size(config: _ClipFile, height: int, width: int) -> tuple[int, int]:
    size = config.size
    if isinstance(size, SizeDict) and size.height and size.width:
        return size.height, size.width
    shortest = size if isinstance(size, int) else size.shortest_edge or 1
    longest = int(shortest * max(height, width) / min(height, width))
    return (longest, shortest) if width <= height else (shortest, longest)


def _window(resized: int, kept: int, original: int) -> tuple[int, int]:
    """Return the part of one side to compute, centred: what the crop keeps, plus the radius of the filters."""
    margin = math.ceil(_FILTER_REACH * max(1.0, resized / original))
    start = (resized - kept) // 2 - margin
    return (0, resized) if start <= 0 else (start, start + kept + 2 * margin)


def _center_crop(pixels: Pixels, height: int, width: int) -> Pixels:
    """Return the [height, width, 3] in the centre; a smaller image is padded with zeros."""
    missing = [max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1])]
    if any(missing):
        before = [(missing[0] + 1) // 2, (missing[1] + 1) // 2]
        pixels = np.pad(pixels, [(before[i], missing[i] - before[i]) for i in range(2)] + [(0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _pad_to_square(image: Image, mean: Channels) -> Image:
    """Centre the image on a square of the mean colour (LlavaImageProcessor with ``do_pad``).

    An image whose square would be very large is reduced first: nothing of that size is left after resizing.
    """
    from PIL import Image as PILImage

    if max(image.size) > _LARGE_SIDE:
        image = image.reduce(math.ceil(max(image.size) / _LARGE_SIDE))
    side = max(image.size)
    square = PILImage.new("RGB", (side, side), (int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
