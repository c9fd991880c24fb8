"""From a picture to crops, as the Hugging Face LLaVA-NeXT processors make them: any resolution ("anyres").

A picture is seen twice: whole, stretched to one square crop; and enlarged, with its proportions, on the canvas among
the model's that fits it best, which is cut into crops. What the canvas has around the picture is padding; the tokens
that see nothing else are left out. The arithmetic is transformers', rounding included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from promprune.errors import PackageError
from promprune.package.image import AnyresLayout
from promprune.runtime.images.preprocess import PixelConfig, SizeDict, pixel_levels, read_pixel_config

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["AnyresPreprocessor", "Placement", "place"]


class _Config(PixelConfig, frozen=True):
    """What is read of ``preprocessor_config.json``; the defaults are LlavaNextImageProcessor's."""

    size: SizeDict = SizeDict(shortest_edge=224)
    do_center_crop: bool = True
    crop_size: SizeDict = SizeDict(height=224, width=224)
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Placement:
    """Where a picture lies on its canvas.

    Attributes:
        canvas: height and width, in pixels.
        resized: height and width of the picture on it, in pixels.
        top, left: where it begins, in pixels.
        rows, columns: of the canvas' tokens, those that are not padding.
    """

    canvas: tuple[int, int]
    resized: tuple[int, int]
    top: int
    left: int
    rows: range
    columns: range


def place(height: int, width: int, layout: AnyresLayout) -> Placement:
    """Return where a picture of ``height`` x ``width`` pixels lies, and which tokens see it."""
    canvas = _best_canvas(height, width, layout.canvases)
    resized = _fitted(height, width, canvas)
    grid = (canvas[0] // layout.side * layout.patches, canvas[1] // layout.side * layout.patches)
    rows, columns = _tokens_of_picture(height, width, grid)
    return Placement(
        canvas=canvas,
        resized=resized,
        top=(canvas[0] - resized[0]) // 2,
        left=(canvas[1] - resized[1]) // 2,
        rows=rows,
        columns=columns,
    )


@dataclass(frozen=True)
class AnyresPreprocessor:
    """Resize, place, cut, rescale and normalise."""

    _config: _Config
    _side: int
    _levels: npt.NDArray[np.float32]  # [3, 256]: what each 8-bit level of each channel becomes

    @classmethod
    def from_file(cls, path: Path, layout: AnyresLayout) -> AnyresPreprocessor:
        """Read a ``preprocessor_config.json``.

        Raises:
            PackageError: it cannot be read, asks for something that is not supported, or makes other crops than
                ``layout`` says.
        """
        config = read_pixel_config(path, _Config)
        size = config.size
        square = (size.height, size.width) if size.height and size.width else (size.shortest_edge, size.shortest_edge)
        crop = (config.crop_size.height, config.crop_size.width) if config.do_center_crop else square
        if not config.do_resize or not square == crop == (layout.side, layout.side):
            raise PackageError(
                f"{path} makes crops of {crop[0]} x {crop[1]} pixels from pictures of {square[0]} x {square[1]}",
                expected=f"do_resize, and {layout.side} x {layout.side} for both, as the vision graph takes",
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

    def canvas(self, image: Image, placement: Placement) -> Image:
        """Return an RGB picture on its canvas, 8 bits."""
        from PIL import Image as PILImage

        height, width = placement.resized
        canvas = PILImage.new("RGB", placement.canvas[::-1])
        canvas.paste(image.resize((width, height), resample=self._config.resample), (placement.left, placement.top))
        return canvas

    def pixel_values(self, pictures: Sequence[Image]) -> npt.NDArray[np.float32]:
        """Return the crops of some pictures, cut row by row: float32 [crops, 3, side, side]."""
        pixels = np.concatenate([self._cut(np.asarray(picture)) for picture in pictures])
        return np.stack([self._levels[channel][pixels[..., channel]] for channel in range(3)], axis=1)

    def _cut(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        side = self._side
        rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
        return pixels.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)


def _best_canvas(height: int, width: int, canvases: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the canvas on which the picture has most pixels; of several, the one with least padding, then the first.

    Enlarging adds no pixels.
    """

    def rank(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return -used, canvas[0] * canvas[1] - used

    return min(canvases, key=rank)


def _fitted(height: int, width: int, canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of a picture that is scaled to fill one side of a canvas."""
    scale_width, scale_height = canvas[1] / width, canvas[0] / height
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * scale_height), canvas[1])


def _tokens_of_picture(height: int, width: int, grid: tuple[int, int]) -> tuple[range, range]:
    """Return the rows and columns of a grid of tokens that are not padding, as transformers counts them.

    Of a picture so long that it is less than a token high, or wide, nothing is left.
    """
    rows, columns = grid
    if width / height > columns / rows:
        left = int(round(height * (columns / width), 7))
        padding = (rows - left) // 2
        return range(padding, rows - padding), range(columns)
    left = int(round(width * (rows / height), 7))
    padding = (columns - left) // 2
    return range(rows), range(padding, columns - padding)
