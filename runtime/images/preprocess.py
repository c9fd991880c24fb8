"""Reading pictures, and the parts of preprocessing that all kinds share.

Pictures are read as follows:

- files and encoded bytes are rotated according to their EXIF orientation; PIL images and arrays are not;
- transparent pictures are composited onto white, as in transformers since version 5;
- 16-bit pictures are converted to 8 bits by Pillow, which clips at 255;
- of an animation, the first frame is used.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from promprune.errors import ImageError, PackageError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Channels",
    "PixelFile",
    "Pixels",
    "Size",
    "SizeDict",
    "load_image",
    "max_decodable_pixels",
    "normalize",
    "pixel_levels",
    "read_pixel_file",
]

Pixels = npt.NDArray[np.uint8]

# Formats that Pillow decodes itself, without starting a program or reading another file. The first ones need no further
# plugins.
_COMMON_FORMATS: Final = ("PNG", "JPEG", "GIF", "BMP", "PPM")
_FORMATS: Final = (*_COMMON_FORMATS, "WEBP", "TIFF", "AVIF", "JPEG2000", "TGA", "ICO")
_READABLE: Final = "a picture Pillow can read (PNG, JPEG, WebP, GIF, BMP, TIFF, ...)"

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Channels = tuple[float, float, float]


class SizeDict(msgspec.Struct, frozen=True):
    """A size in the configuration of an image processor, in pixels."""

    shortest_edge: Size | None = None
    longest_edge: Size | None = None
    height: Size | None = None
    width: Size | None = None


class PixelFile(msgspec.Struct, frozen=True):
    """The keys for pixels that all kinds of ``preprocessor_config.json`` share; defaults of CLIPImageProcessor."""

    do_resize: bool = True
    resample: Literal[0, 1, 2, 3, 4, 5] = 3
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Channels = (0.48145466, 0.4578275, 0.40821073)
    image_std: Channels = (0.26862954, 0.26130258, 0.27577711)


ConfigT = TypeVar("ConfigT", bound=PixelFile)


def load_image(source: str | Path | bytes | Image | Pixels) -> Image:
    """Return a picture as 8-bit RGB.

    Args:
        source: a file, the bytes of one, a PIL image, or an array [height, width, 3] of uint8.

    Raises:
        ImageError: it is missing, not a picture, damaged, or so large that it may be a decompression bomb.
    """
    from PIL import Image as PILImage

    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ImageError(
                f"received an array {source.dtype}{list(source.shape)}", expected="uint8 [height, width, 3]"
            )
        return PILImage.fromarray(np.ascontiguousarray(source))
    if isinstance(source, PILImage.Image):
        return _decode(source, "the image", upright=False)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open(io.BytesIO(source), "the image", len(source))
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        raise ImageError(f"{source[:100]} is a URL", expected="a file", fix="download it first, or pass its bytes")
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
            found = "a folder" if path.is_dir() else "not a regular file"
            raise ImageError(f"{path} is {found}", expected="an image file", fix="give the path of a file")
        with path.open("rb") as stream:
            return _open(stream, str(path), path.stat().st_size)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{path!s} cannot be read ({reason})", expected="an image file") from error


def _open(stream: Any, name: str, size_bytes: int) -> Image:
    from PIL import UnidentifiedImageError

    if size_bytes == 0:
        raise ImageError(f"{name} is empty (0 bytes)", expected=_READABLE, fix="fetch the file again")
    try:
        image = _identify(stream)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not an image, or has an unsupported format", expected=_READABLE, fix="convert it to PNG"
        ) from error
    except Exception as error:  # on hostile bytes the decoders raise almost every type of error
        raise _decode_error(name, error) from error
    return _decode(image, name, upright=True)


def _identify(stream: Any) -> Image:
    from PIL import Image as PILImage
    from PIL import UnidentifiedImageError

    try:
        return PILImage.open(stream, formats=_COMMON_FORMATS)
    except UnidentifiedImageError:
        PILImage.init()
        stream.seek(0)
        return PILImage.open(stream, formats=[name for name in _FORMATS if name in PILImage.OPEN])


def _decode(image: Image, name: str, *, upright: bool) -> Image:
    from PIL import ImageOps

    if 0 in image.size:
        raise ImageError(f"{name} is {image.width} x {image.height} pixels", expected="at least one pixel")
    try:
        image.load()
        return _as_rgb(ImageOps.exif_transpose(image) if upright else image)
    except Exception as error:  # as above
        raise _decode_error(name, error) from error


def _as_rgb(image: Image) -> Image:
    from PIL import Image as PILImage

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = PILImage.alpha_composite(PILImage.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _decode_error(name: str, error: Exception) -> ImageError:
    from PIL import Image as PILImage

    if isinstance(error, PILImage.DecompressionBombError):
        return ImageError(
            f"{name} has too many pixels to decode safely",
            expected=f"at most {max_decodable_pixels()} pixels",
            fix="resize it first",
        )
    if isinstance(error, MemoryError):
        return ImageError(f"{name} does not fit into memory", expected="a smaller image", fix="resize it first")
    return ImageError(
        f"{name} is damaged or truncated ({first_line(error)})", expected=_READABLE, fix="fetch the file again"
    )


def max_decodable_pixels() -> int:
    """Return the largest number of pixels that Pillow decodes."""
    from PIL import Image as PILImage

    return 2 * PILImage.MAX_IMAGE_PIXELS if PILImage.MAX_IMAGE_PIXELS else sys.maxsize


def read_pixel_file(path: Path, config_type: type[ConfigT]) -> ConfigT:
    """Read a ``preprocessor_config.json``.

    Raises:
        PackageError: it cannot be read, or has values of other types than ``config_type``.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=config_type)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PackageError(f"{path} is not a usable image processor ({error})", fix="export again") from error


def pixel_levels(config: PixelFile, path: Path) -> npt.NDArray[np.float32]:
    """Return the normalised value of every 8-bit level per channel, float32 [3, 256]; computed like the reference.

    Raises:
        PackageError: a value is not finite.
    """
    table = _levels(config)
    if not np.isfinite(table).all():
        raise PackageError(
            f"{path} rescales or normalises to values that are not finite",
            expected="a finite rescale_factor and image_mean, image_std other than 0",
            fix="export again",
        )
    return table


def normalize(pixels: Pixels, levels: npt.NDArray[np.float32], *, axis: int = 0) -> npt.NDArray[np.float32]:
    """Return the normalised values of ``pixels [..., 3]``, with the channels at ``axis``: float32."""
    return np.stack([levels[channel][pixels[..., channel]] for channel in range(3)], axis=axis)


def _levels(config: PixelFile) -> npt.NDArray[np.float32]:
    levels = np.arange(256, dtype=np.float64)
    with np.errstate(all="ignore"):  # the caller refuses values that are not finite
        scaled = (levels * config.rescale_factor if config.do_rescale else levels).astype(np.float32)
        table = np.repeat(scaled[None], 3, axis=0)
        if config.do_normalize:
            mean = np.array(config.image_mean, np.float32)[:, None]
            table = (table - mean) / np.array(config.image_std, np.float32)[:, None]
    return table.astype(np.float32)
