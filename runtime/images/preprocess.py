"""From a picture to ``pixel_values``, as the Hugging Face CLIP and LLaVA image processors do it.

Where they leave a choice, this is what happens:

- files and encoded bytes are turned upright as their EXIF orientation says; PIL images and arrays are taken as
  they are;
- transparency is composited onto white, as transformers does since version 5;
- 16-bit pictures become 8-bit the way Pillow converts them, which clips at 255;
- of an animation, the first frame counts.
"""

from __future__ import annotations

import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from promprune.errors import ImageError, PackageError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImagePreprocessor", "PixelConfig", "load_image", "pixel_levels", "read_pixel_config"]

Pixels = npt.NDArray[np.uint8]

# Formats that Pillow decodes by itself: nothing here starts another program or reads another file. The first
# ones need no further plugins.
_COMMON_FORMATS: Final = ("PNG", "JPEG", "GIF", "BMP", "PPM")
_FORMATS: Final = (*_COMMON_FORMATS, "WEBP", "TIFF", "AVIF", "JPEG2000", "TGA", "ICO")
_READABLE: Final = "a picture Pillow can read (PNG, JPEG, WebP, GIF, BMP, TIFF, ...)"
_FILTER_REACH: Final = 4  # output or input pixels, whichever is larger, beyond which no filter looks
_LARGE_PIXELS: Final = 16_000_000  # a resized image larger than this is computed only where the crop needs it

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Channels = tuple[float, float, float]


class SizeDict(msgspec.Struct, frozen=True):
    """A size as image processors write it, in pixels."""

    shortest_edge: Size | None = None
    longest_edge: Size | None = None
    height: Size | None = None
    width: Size | None = None


class PixelConfig(msgspec.Struct, frozen=True):
    """What every ``preprocessor_config.json`` says of pixels; the defaults are CLIPImageProcessor's."""

    do_resize: bool = True
    resample: Literal[0, 1, 2, 3, 4, 5] = 3
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Channels = (0.48145466, 0.4578275, 0.40821073)
    image_std: Channels = (0.26862954, 0.26130258, 0.27577711)


class _Config(PixelConfig, frozen=True):
    """What is read of ``preprocessor_config.json``; the defaults are CLIPImageProcessor's."""

    image_processor_type: str = "CLIPImageProcessor"
    size: SizeDict | Size = SizeDict(shortest_edge=224)
    do_center_crop: bool = True
    crop_size: SizeDict | Size = SizeDict(height=224, width=224)
    do_pad: bool | None = None


ConfigT = TypeVar("ConfigT", bound=PixelConfig)


@dataclass(frozen=True)
class ImagePreprocessor:
    """Resize, centre crop, rescale and normalise.

    Attributes:
        height, width: of what comes out, in pixels.
    """

    height: int
    width: int
    _config: _Config
    _levels: npt.NDArray[np.float32]  # [3, 256]: what each 8-bit level of each channel becomes

    @classmethod
    def from_file(cls, path: Path, *, height: int, width: int) -> ImagePreprocessor:
        """Read a ``preprocessor_config.json``.

        Args:
            path: the file.
            height, width: what the vision graph takes, in pixels; the file has to lead there.

        Raises:
            PackageError: it cannot be read, asks for something that is not supported, or leads to another size.
        """
        config = read_pixel_config(path, _Config)
        final = _final_size(config, path)
        if final != (height, width):
            raise PackageError(
                f"{path} makes images of {final[0]} x {final[1]} pixels",
                expected=f"{height} x {width}, as the vision graph takes",
                fix="export again",
            )
        return cls(height, width, config, pixel_levels(config, path))

    def crop(self, image: Image) -> Image:
        """Return the part of an RGB image that the model sees, ``height`` x ``width`` pixels, 8 bits."""
        from PIL import Image as PILImage

        if self._config.do_pad:
            image = _padded_to_square(image, self._config.image_mean)
        if self._config.do_resize:
            image = self._resized(image)
        if self._config.do_center_crop:
            image = PILImage.fromarray(_center_crop(np.asarray(image), self.height, self.width))
        return image

    def pixel_values(self, crop: Image) -> npt.NDArray[np.float32]:
        """Return what the vision graph takes of one cropped image: float32 [1, 3, height, width]."""
        pixels = np.asarray(crop)
        return np.stack([self._levels[channel][pixels[..., channel]] for channel in range(3)])[None]

    def __call__(self, image: Image) -> npt.NDArray[np.float32]:
        """Return ``pixel_values(crop(image))``: float32 [1, 3, height, width]."""
        return self.pixel_values(self.crop(image))

    def _resized(self, image: Image) -> Image:
        height, width = _resized_size(self._config, image.height, image.width)
        if self._config.do_center_crop and height * width > _LARGE_PIXELS:
            return self._resized_middle(image, height, width)
        return image.resize((width, height), resample=self._config.resample)

    def _resized_middle(self, image: Image, height: int, width: int) -> Image:
        """Resize only what the crop will keep of a very long image, which could be too large for memory.

        Within one level (1/255) of resizing all of it, but for noise that the filter overshoots on: there the
        order of Pillow's two passes shows, which depends on the sizes.
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


def load_image(source: str | Path | bytes | Image | Pixels) -> Image:
    """Return a picture as 8-bit RGB.

    Args:
        source: a file, the bytes of one, a PIL image, or an array [height, width, 3] of uint8.

    Raises:
        ImageError: it is missing, no picture, damaged, or so large that decoding it would be an attack.
    """
    from PIL import Image as PILImage

    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ImageError(
                f"received an array {source.dtype}{list(source.shape)}", expected="uint8 [height, width, 3]"
            )
        return PILImage.fromarray(np.ascontiguousarray(source))
    if isinstance(source, PILImage.Image):
        return _decoded(source, "the image", upright=False)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _opened(io.BytesIO(source), "the image", len(source))
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        raise ImageError(f"{source[:100]} is an address", expected="a file", fix="download it first, or pass its bytes")
    if isinstance(source, (str, Path)):
        return _load_file(Path(source))
    raise ImageError(
        f"received an image of type {type(source).__name__}", expected="a file, bytes, a PIL image or an array"
    )


def _load_file(path: Path) -> Image:
    try:
        if not path.exists():
            raise ImageError(f"{path} does not exist", expected="an image file", fix="check the path")
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no regular file"
            raise ImageError(f"{path} is {found}", expected="an image file", fix="name the file itself")
        with path.open("rb") as stream:
            return _opened(stream, str(path), path.stat().st_size)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{path!s} cannot be read ({reason})", expected="an image file") from error


def _opened(stream: Any, name: str, size_bytes: int) -> Image:
    from PIL import UnidentifiedImageError

    if size_bytes == 0:
        raise ImageError(f"{name} is empty (0 bytes)", expected=_READABLE, fix="fetch the file again")
    try:
        image = _identified(stream)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not an image, or of a format that is not read", expected=_READABLE, fix="convert it to PNG"
        ) from error
    except Exception as error:  # the decoders raise nearly every type on hostile bytes
        raise _undecodable(name, error) from error
    return _decoded(image, name, upright=True)


def _identified(stream: Any) -> Image:
    from PIL import Image as PILImage
    from PIL import UnidentifiedImageError

    try:
        return PILImage.open(stream, formats=_COMMON_FORMATS)
    except UnidentifiedImageError:
        PILImage.init()
        stream.seek(0)
        return PILImage.open(stream, formats=[name for name in _FORMATS if name in PILImage.OPEN])


def _decoded(image: Image, name: str, *, upright: bool) -> Image:
    from PIL import ImageOps

    if 0 in image.size:
        raise ImageError(f"{name} is {image.width} x {image.height} pixels", expected="at least one pixel")
    try:
        image.load()
        return _as_rgb(ImageOps.exif_transpose(image) if upright else image)
    except Exception as error:  # as above
        raise _undecodable(name, error) from error


def _as_rgb(image: Image) -> Image:
    from PIL import Image as PILImage

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _undecodable(name: str, error: Exception) -> ImageError:
    from PIL import Image as PILImage

    if isinstance(error, PILImage.DecompressionBombError):
        return ImageError(
            f"{name} has too many pixels to decode safely",
            expected=f"at most {_most_pixels()} pixels",
            fix="resize it first",
        )
    if isinstance(error, MemoryError):
        return ImageError(f"{name} does not fit the memory", expected="a smaller image", fix="resize it first")
    return ImageError(
        f"{name} is damaged or truncated ({first_line(error)})", expected=_READABLE, fix="fetch the file again"
    )


def _most_pixels() -> int:
    """Return how many pixels Pillow decodes: it refuses a picture of more."""
    from PIL import Image as PILImage

    return 2 * PILImage.MAX_IMAGE_PIXELS if PILImage.MAX_IMAGE_PIXELS else sys.maxsize


def read_pixel_config(path: Path, config_type: type[ConfigT]) -> ConfigT:
    """Read a ``preprocessor_config.json``.

    Raises:
        PackageError: it cannot be read, or says something else than ``config_type`` knows.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=config_type)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PackageError(f"{path} is not a usable image processor ({error})", fix="export again") from error


def pixel_levels(config: PixelConfig, path: Path) -> npt.NDArray[np.float32]:
    """Return what every 8-bit level of each channel becomes, float32 [3, 256]; computed as the reference does.

    Raises:
        PackageError: some of it is not a finite number.
    """
    table = _levels(config)
    if not np.isfinite(table).all():
        raise PackageError(
            f"{path} rescales or normalises to values that are not finite",
            expected="a finite rescale_factor and image_mean, image_std other than 0",
            fix="export again",
        )
    return table


def _levels(config: PixelConfig) -> npt.NDArray[np.float32]:
    levels = np.arange(256, dtype=np.float64)
    with np.errstate(all="ignore"):  # the caller refuses what is not finite
        scaled = (levels * config.rescale_factor if config.do_rescale else levels).astype(np.float32)
        table = np.repeat(scaled[None], 3, axis=0)
        if config.do_normalize:
            mean = np.array(config.image_mean, np.float32)[:, None]
            table = (table - mean) / np.array(config.image_std, np.float32)[:, None]
    return table.astype(np.float32)


def _final_size(config: _Config, path: Path) -> tuple[int, int]:
    if config.do_pad and not config.image_processor_type.startswith("Llava"):
        raise PackageError(f"{path} has do_pad with {config.image_processor_type}", expected="do_pad off")
    size = config.crop_size if config.do_center_crop else config.size
    fixed = (size, size) if isinstance(size, int) and config.do_center_crop else None
    if isinstance(size, SizeDict) and size.height and size.width:
        fixed = (size.height, size.width)
    if fixed is None or not (config.do_center_crop or config.do_resize):
        raise PackageError(f"{path} leads to no fixed size", expected="crop_size, or size with height and width")
    if config.do_resize and isinstance(config.size, SizeDict):
        known = config.size.shortest_edge or (config.size.height and config.size.width)
        if not known or config.size.longest_edge:
            raise PackageError(f"{path} has size {config.size}", expected="shortest_edge, or height and width")
    return fixed


def _resized_size(config: _Config, height: int, width: int) -> tuple[int, int]:
    size = config.size
    if isinstance(size, SizeDict) and size.height and size.width:
        return size.height, size.width
    shortest = size if isinstance(size, int) else size.shortest_edge or 1
    longest = int(shortest * max(height, width) / min(height, width))
    return (longest, shortest) if width <= height else (shortest, longest)


def _window(resized: int, kept: int, original: int) -> tuple[int, int]:
    """Return the part of one side to compute: what the crop keeps and what its filters look at, centred."""
    margin = math.ceil(_FILTER_REACH * max(1.0, resized / original))
    start = (resized - kept) // 2 - margin
    return (0, resized) if start <= 0 else (start, start + kept + 2 * margin)


def _center_crop(pixels: Pixels, height: int, width: int) -> Pixels:
    """Cut [height, width, 3] out of the middle; where the image is smaller, zeros surround it."""
    missing = [max(0, height - pixels.shape[0]), max(0, width - pixels.shape[1])]
    if any(missing):
        before = [(missing[0] + 1) // 2, (missing[1] + 1) // 2]
        pixels = np.pad(pixels, [(before[i], missing[i] - before[i]) for i in range(2)] + [(0, 0)])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]


def _padded_to_square(image: Image, mean: Channels) -> Image:
    """Centre the image on a square of the mean colour (LlavaImageProcessor with ``do_pad``).

    Raises:
        ImageError: the square would have more pixels than are decoded.
    """
    from PIL import Image as PILImage

    side = max(image.size)
    if side * side > _most_pixels():
        raise ImageError(
            f"the image is {image.width} x {image.height} pixels, and this model pads it to {side} x {side}",
            expected=f"at most {_most_pixels()} pixels then",
            fix="resize or crop it first",
        )
    square = PILImage.new("RGB", (side, side), (int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
