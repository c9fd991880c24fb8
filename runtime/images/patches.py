"""From a picture to rows of patches, as the Hugging Face Qwen2-VL image processors make them.

A picture is resized to one of the grids that a package has graphs for, whatever its own size; where that is the
size which ``smart_resize`` would have chosen, the patches are those of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from promprune.errors import PackageError
from promprune.runtime.images.preprocess import PixelConfig, pixel_levels, read_pixel_config

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PatchPreprocessor", "closest_shape"]


class _Config(PixelConfig, frozen=True):
    """What is read of ``preprocessor_config.json``; the defaults are Qwen2VLImageProcessor's."""

    image_processor_type: str = "Qwen2VLImageProcessor"
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2


@dataclass(frozen=True)
class PatchPreprocessor:
    """Resize, rescale, normalise, and cut into patches."""

    _config: _Config
    _levels: npt.NDArray[np.float32]  # [3, 256]: what each 8-bit level of each channel becomes

    @classmethod
    def from_file(cls, path: Path) -> PatchPreprocessor:
        """Read a ``preprocessor_config.json``.

        Raises:
            PackageError: it cannot be read, or asks for something that is not supported.
        """
        config = read_pixel_config(path, _Config)
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
        """Numbers that describe one patch: three channels, at several times, of a square of pixels."""
        return 3 * self._config.temporal_patch_size * self._config.patch_size**2

    @property
    def group(self) -> int:
        """Patches of one token."""
        return self._config.merge_size**2

    def resized(self, image: Image, *, rows: int, columns: int) -> Image:
        """Return an RGB image in the size of a grid of tokens, 8 bits."""
        size = (columns * self.token_pixels, rows * self.token_pixels)
        return image.resize(size, resample=self._config.resample)

    def pixel_values(self, resized: Image) -> npt.NDArray[np.float32]:
        """Return the patches of a resized image, those of one token together: float32 [1, patches, patch_values]."""
        side, merge, times = self._config.patch_size, self._config.merge_size, self._config.temporal_patch_size
        pixels = np.asarray(resized)
        channels = np.stack([self._levels[channel][pixels[..., channel]] for channel in range(3)])
        rows, columns = pixels.shape[0] // self.token_pixels, pixels.shape[1] // self.token_pixels
        # channel, token row, patch in it, pixel in that; the same for columns
        patches = channels.reshape(3, rows, merge, side, columns, merge, side).transpose(1, 4, 2, 5, 0, 3, 6)
        moving = np.repeat(patches[:, :, :, :, :, None], times, axis=5)  # a still image, at several times
        return moving.reshape(1, rows * columns * self.group, self.patch_values)


def closest_shape(height: int, width: int, grids: Iterable[tuple[int, int]]) -> int:
    """Return which grid distorts a picture least; of several, the one nearest in size.

    Args:
        height, width: of the picture, in pixels.
        grids: height and width of each, in pixels.
    """

    def distance(grid: tuple[int, int]) -> tuple[float, float]:
        aspect = (grid[1] * height) / (grid[0] * width)
        area = (grid[0] * grid[1]) / (height * width)
        return abs(math.log(aspect)), abs(math.log(area))

    distances = [distance(grid) for grid in grids]
    return distances.index(min(distances))
