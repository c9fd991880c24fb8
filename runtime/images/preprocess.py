"""Reading pictures, and the parts of preprocessing that all kinds share.

Pictures are read as follows:

- files and encoded bytes are rotated according to their EXIF orientation; PIL images and arrays are not;
- transparent pictures are composited onto white, as in transformers since version 5;
- 16-bit pictures are converted to 8 bits by Pillow, which clips at 255;
- of an animation, the first frame is used;
- JPEGs of more than 16 million pixels are decoded at half or a quarter of their size.

A picture costs a bounded amount of memory and time, whatever its bytes are: see ``docs/security.md``.
"""

from __future__ import annotations

import errno
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from promprune.errors import ImageError, PackageError, first_line
from promprune.inputs import read_file
from promprune.package.contents import MAX_CONFIG_BYTES
from promprune.runtime.images.headers import MAX_EXIF_BYTES, MAX_SIDE, READABLE, ImageFormat, identify
from promprune.runtime.sessions.config import RuntimeConfig

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

__all__ = [
    "Channels",
    "PixelFile",
    "Pixels",
    "Size",
    "SizeDict",
    "load_image",
    "normalize",
    "pixel_levels",
    "read_image_file",
    "read_pixel_file",
]

Pixels = npt.NDArray[np.uint8]

_COMPILED_DECODERS: Final = frozenset({"raw", "zip", "jpeg", "gif"})  # not Pillow's in Python, nor libtiff
_FILE_BYTES_PER_PIXEL: Final = 4  # most bytes of a file per pixel that is allowed
_FULL_SIZE_PIXELS: Final = 16_000_000  # JPEGs with more are decoded at half their size, or at a quarter
_STRIP_PIXELS: Final = 4_000_000
_ORIENTATION: Final = 0x0112  # the EXIF tag
_SAVE: Final = "save it as PNG or JPEG first"

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


def load_image(
    source: str | Path | bytes | Image | Pixels, *, max_pixels: int = RuntimeConfig.max_image_pixels
) -> Image:
    """Return a picture as 8-bit RGB.

    Size and format are read from the header and checked before any pixel is decoded. Decoding takes at most about
    12 bytes of memory per pixel of ``max_pixels``.

    Args:
        source: a file, the bytes of one, a PIL image, or an array [height, width, 3] of uint8. Files and bytes are PNG,
            JPEG, WebP, GIF, BMP (uncompressed), PPM (binary) or AVIF.
        max_pixels: most pixels of the picture; half of it for WebP and AVIF, whose decoders take more memory per pixel.
            A file has at most 4 bytes per pixel of it.

    Raises:
        ImageError: it is missing, not a picture in one of these formats, damaged, or too large.
    """
    from PIL import Image as PILImage

    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or 0 in source.shape:
            raise ImageError(
                f"received an array {source.dtype}{list(source.shape)}", expected="uint8 [height, width, 3]"
            )
        _check_size("the image", source.shape[1], source.shape[0], max_pixels)
        return PILImage.fromarray(np.ascontiguousarray(source))
    if isinstance(source, PILImage.Image):
        _check_size("the image", *source.size, max_pixels)
        image = _decode(source, "the image", upright=False)
        return image.copy() if image is source else image
    if isinstance(source, (bytes, bytearray, memoryview)):
        if len(source) > _FILE_BYTES_PER_PIXEL * max_pixels:
            raise _too_many_bytes("the image", len(source), max_pixels)
        return _open(bytes(source), "the image", max_pixels)
    if isinstance(source, (str, Path)):
        return _open(read_image_file(source, max_pixels=max_pixels), str(source), max_pixels)
    raise ImageError(
        f"received an image of type {type(source).__name__}", expected="a file, bytes, a PIL image or an array"
    )


def read_image_file(source: str | Path, *, max_pixels: int) -> bytes:
    """Return the content of an image file.

    Raises:
        ImageError: it is a URL, missing, not a file, or has more than 4 bytes per pixel of ``max_pixels``.
    """
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        raise ImageError(f"{source[:100]} is a URL", expected="a file", fix="download it first, or pass its bytes")
    path = Path(source)
    try:
        if not path.exists():
            raise ImageError(f"{path} does not exist", expected="an image file", fix="check the path")
        if not path.is_file():
            found = "a folder" if path.is_dir() else "not a regular file"
            raise ImageError(f"{path} is {found}", expected="an image file", fix="give the path of a file")
        return read_file(path, most_bytes=_FILE_BYTES_PER_PIXEL * max_pixels)
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            raise _too_many_bytes(str(path), path.stat().st_size, max_pixels) from error
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{path!s} cannot be read ({reason})", expected="an image file") from error


def _too_many_bytes(name: str, size_bytes: int, max_pixels: int) -> ImageError:
    return ImageError(
        f"{name} has {size_bytes} bytes",
        expected=f"at most {_FILE_BYTES_PER_PIXEL * max_pixels} bytes for {max_pixels} pixels",
        fix="save it as JPEG first, or allow more pixels",
    )


def _open(content: bytes, name: str, max_pixels: int) -> Image:
    if not content:
        raise ImageError(f"{name} is empty (0 bytes)", expected=READABLE, fix="fetch the file again")
    kind = identify(content)
    if kind is None:
        raise _not_readable(name)
    try:
        image = _open_as(kind, content)
    except ImageError as error:
        raise ImageError(f"{name} {error}", expected="a file as cameras and browsers write it", fix=_SAVE) from error
    except Exception as error:  # on hostile bytes the decoders raise almost every type of error
        raise _decode_error(name, error, max_pixels) from error
    _check_size(name, *image.size, max_pixels // kind.cost)
    _halve_if_large(image)
    return _decode(image, name, upright=True)


def _open_as(kind: ImageFormat, content: bytes) -> ImageFile:
    """Read the header of a file.

    Raises:
        ImageError: it would be expensive to decode; the message continues the name of the file.
        Exception: it is damaged.
    """
    from PIL import Image as PILImage

    # Pillow warns about damaged metadata and large pictures; damaged pixels are errors, and the size is checked here.
    warnings.filterwarnings("ignore", module=r"PIL\b")
    if obstacle := kind.obstacle(content):
        raise ImageError(obstacle)
    kind.load_plugin()
    image = PILImage.open(io.BytesIO(content), formats=[kind.name])
    if slow := {tile[0] for tile in image.tile} - _COMPILED_DECODERS:
        raise ImageError(f"is a {kind.name} with a slow or unsafe decoder ({', '.join(sorted(slow))})")
    exif = image.info.get("exif") or image.info.get("Raw profile type exif") or b""
    if len(exif) > 2 * MAX_EXIF_BYTES:  # a text has two digits per byte
        raise ImageError(f"has {len(exif)} bytes of EXIF data")
    return image


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if 0 in (width, height):
        raise ImageError(f"{name} is {width} x {height} pixels", expected="at least one pixel")
    if width * height > max_pixels:
        raise _too_many_pixels(f"{name} has too many pixels ({width} x {height})", max_pixels)
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"{name} is {width} x {height} pixels", expected=f"at most {MAX_SIDE} on each side", fix="crop it first"
        )


def _halve_if_large(image: ImageFile) -> None:
    """Let a JPEG with many more pixels than any model sees be decoded at half or a quarter of its size."""
    shrunk = 1
    while image.width * image.height > _FULL_SIZE_PIXELS * shrunk**2:
        shrunk *= 2
    if shrunk > 1:
        image.draft(None, (image.width // shrunk, image.height // shrunk))  # of other formats, it does nothing


def _decode(image: Image, name: str, *, upright: bool) -> Image:
    try:
        image.load()
        return _as_rgb(_rotate_upright(image) if upright else image)
    except Exception as error:  # as above
        raise _decode_error(name, error) from error


def _rotate_upright(image: Image) -> Image:
    """Return an image as its EXIF orientation says, like Pillow's ``exif_transpose``, which also rewrites the EXIF."""
    from PIL import Image as PILImage

    method = PILImage.Transpose
    turns = {
        2: method.FLIP_LEFT_RIGHT,
        3: method.ROTATE_180,
        4: method.FLIP_TOP_BOTTOM,
        5: method.TRANSPOSE,
        6: method.ROTATE_270,
        7: method.TRANSVERSE,
        8: method.ROTATE_90,
    }
    turn = turns.get(image.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _as_rgb(image: Image) -> Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image) -> Image:
    """Composite a transparent picture onto white, strip by strip, which limits the memory for intermediate results."""
    from PIL import Image as PILImage

    whole = PILImage.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = PILImage.new("RGBA", strip.size, (255, 255, 255, 255))
        whole.paste(PILImage.alpha_composite(white, strip).convert("RGB"), (0, top))
    return whole


def _decode_error(name: str, error: Exception, max_pixels: int = RuntimeConfig.max_image_pixels) -> ImageError:
    from PIL import Image as PILImage
    from PIL import UnidentifiedImageError

    if isinstance(error, PILImage.DecompressionBombError):
        return _too_many_pixels(f"{name} has too many pixels", max_pixels)
    if isinstance(error, MemoryError):
        return ImageError(f"{name} does not fit into memory", expected="a smaller image", fix="resize it first")
    if isinstance(error, (UnidentifiedImageError, ModuleNotFoundError)):
        return _not_readable(name)
    return ImageError(
        f"{name} is damaged or truncated ({first_line(error)})", expected=READABLE, fix="fetch the file again"
    )


def _not_readable(name: str) -> ImageError:
    return ImageError(f"{name} is not an image, or has an unsupported format", expected=READABLE, fix=_SAVE)


def _too_many_pixels(received: str, max_pixels: int) -> ImageError:
    return ImageError(
        received, expected=f"at most {max_pixels}", fix="resize it first, or allow more with max_image_pixels"
    )


def read_pixel_file(path: Path, config_type: type[ConfigT]) -> ConfigT:
    """Read a ``preprocessor_config.json``.

    Raises:
        PackageError: it cannot be read, or has values of other types than ``config_type``.
    """
    try:
        return msgspec.json.decode(read_file(path, most_bytes=MAX_CONFIG_BYTES), type=config_type)
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
