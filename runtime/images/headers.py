"""Headers of image files: the format, and what would make decoding expensive, checked before any pixel is decoded.

Only formats that people use for photographs and screenshots are read. For each, Pillow decodes with compiled code,
without starting a program and without a library that writes to stderr. What remains is bounded here: decoders and
Pillow's own parsers take time for every chunk, segment, comment and scan of a file, whatever its size in pixels.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

__all__ = ["MAX_EXIF_BYTES", "MAX_SIDE", "READABLE", "ImageFormat", "identify"]

READABLE: Final = "PNG, JPEG, WebP, GIF, BMP (uncompressed), PPM (binary) or AVIF"
MAX_SIDE: Final = 65_535  # pixels; no JPEG is longer. Resizing takes memory in proportion to the longest side
MAX_EXIF_BYTES: Final = 65_535  # one segment of a JPEG; Pillow copies the values of tags, and tags may overlap
_MAX_CHUNKS: Final = 65_536  # of a PNG: 500 MB in chunks of 8 KiB, as libpng writes them
_MAX_SEGMENTS: Final = 1024  # of a JPEG before its pixels
_MAX_BLOCKS: Final = 8192  # of a GIF before its first picture, 255 bytes each
_MAX_SKIPPED_BYTES: Final = 65_536  # between the segments of a JPEG, or the blocks of a GIF
_MAX_SCANNED_PIXELS: Final = 1_000_000_000  # pixels times scans of a JPEG
_PPM_HEADER: Final = re.compile(rb"P[456](?:(?:\s|#[^\r\n]*[\r\n])+\d+){2}")
_PPM_HEADER_BYTES: Final = 4096
_START_OF_FRAME: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH: Final = frozenset({0x01, *range(0xD0, 0xDA)})  # markers of a JPEG that are not followed by a length


@dataclass(frozen=True)
class ImageFormat:
    """One format that is read.

    Attributes:
        name: Pillow's name of it.
        obstacle: returns why the content of a file would be expensive to decode; empty if it would not be.
        plugin: Pillow's module for it.
        cost: how many times as much memory per pixel its decoder takes as those of the other formats.
    """

    name: str
    obstacle: Callable[[bytes], str]
    plugin: str
    cost: int = 1

    def load_plugin(self) -> None:
        """Import Pillow's module; otherwise Pillow imports all of its modules on first use."""
        importlib.import_module(self.plugin)


def identify(content: bytes) -> ImageFormat | None:
    """Return the format of a file by its first bytes; None if it is not one that is read."""
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return _WEBP
    if content[4:8] == b"ftyp" and content[8:12] in (b"avif", b"avis", b"mif1", b"msf1"):
        return _AVIF
    return next((found for magic, found in _BY_MAGIC if content.startswith(magic)), None)


def _nothing(content: bytes) -> str:
    return ""


def _png_obstacle(content: bytes) -> str:
    place = 8
    for _ in range(_MAX_CHUNKS):
        length, kind = int.from_bytes(content[place : place + 4]), content[place + 4 : place + 8]
        if kind == b"eXIf" and length > MAX_EXIF_BYTES:
            return f"has {length} bytes of EXIF data"
        place += 12 + length
        if place >= len(content) or kind == b"IEND":
            return ""
    return f"has more than {_MAX_CHUNKS} chunks"


def _jpeg_obstacle(content: bytes) -> str:
    """Walk over the segments before the first scan, as Pillow does, and count the scans."""
    place, skipped, exif_bytes, pixels = 2, 0, 0, 0
    for _ in range(_MAX_SEGMENTS):
        start = content.find(b"\xff", place)
        while content[start + 1 : start + 2] in (b"\xff", b"\0") and skipped <= _MAX_SKIPPED_BYTES:
            start, skipped = start + 1, skipped + 1
        skipped += max(0, start - place)
        if skipped > _MAX_SKIPPED_BYTES:
            return "has too many bytes between its segments"
        marker, length = content[start + 1 : start + 2], int.from_bytes(content[start + 2 : start + 4])
        if start < 0 or not marker:
            return ""  # cut short: the decoder says so
        if marker == b"\xda":
            return _scans_obstacle(content, start, pixels)
        if marker[0] in _START_OF_FRAME:
            height, width = content[start + 5 : start + 7], content[start + 7 : start + 9]
            pixels = max(pixels, int.from_bytes(height) * int.from_bytes(width))
        exif_bytes += length if content[start + 4 : start + 8] == b"Exif" else 0
        if exif_bytes > MAX_EXIF_BYTES:
            return f"has {exif_bytes} bytes of EXIF data"
        place = start + 2 + (0 if marker[0] in _WITHOUT_LENGTH else max(2, length))
    return f"has more than {_MAX_SEGMENTS} segments before its pixels"


def _scans_obstacle(content: bytes, start: int, pixels: int) -> str:
    """Return whether a JPEG has too many scans for its size; their markers occur nowhere else in the coded pixels."""
    end = content.find(b"\xff\xd9", start)
    scans = content.count(b"\xff\xda", start, end if end >= 0 else len(content))
    most = max(1, _MAX_SCANNED_PIXELS // max(1, pixels))
    return f"has {scans} scans of {pixels} pixels; expected at most {most}" if scans > most else ""


def _gif_obstacle(content: bytes) -> str:
    """Walk over the blocks before the first picture."""
    flags = content[10] if len(content) > 10 else 0
    place, blocks, skipped = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0), 0, 0
    while place < len(content) and content[place] not in b",;":
        if content[place] != 0x21:
            place, skipped = place + 1, skipped + 1
            if skipped > _MAX_SKIPPED_BYTES:
                return "has too many bytes between its blocks"
            continue
        place += 2  # the introducer and the label of an extension; then come its blocks, up to an empty one
        while place < len(content) and content[place]:
            place, blocks = place + 1 + content[place], blocks + 1
            if blocks > _MAX_BLOCKS:
                return f"has more than {_MAX_BLOCKS} blocks before its first picture"
        place += 1
    return ""


def _ppm_obstacle(content: bytes) -> str:
    found = _PPM_HEADER.match(content[:_PPM_HEADER_BYTES])
    return "" if found else f"has no size in its first {_PPM_HEADER_BYTES} bytes"


def _avif_obstacle(content: bytes) -> str:
    """Ask the decoder for the EXIF data, which Pillow parses when it opens the file."""
    try:
        from PIL import _avif

        exif = _avif.AvifDecoder(content, "auto", 1).get_info()[4]
    except Exception:  # damaged, or Pillow lacks it: reported when Pillow opens the file
        return ""
    return f"has {len(exif)} bytes of EXIF data" if exif and len(exif) > MAX_EXIF_BYTES else ""


_WEBP: Final = ImageFormat("WEBP", _nothing, "PIL.WebPImagePlugin", cost=2)
_AVIF: Final = ImageFormat("AVIF", _avif_obstacle, "PIL.AvifImagePlugin", cost=2)
_PPM: Final = ImageFormat("PPM", _ppm_obstacle, "PIL.PpmImagePlugin")
_GIF: Final = ImageFormat("GIF", _gif_obstacle, "PIL.GifImagePlugin")
_BY_MAGIC: Final = (
    (b"\x89PNG\r\n\x1a\n", ImageFormat("PNG", _png_obstacle, "PIL.PngImagePlugin")),
    (b"\xff\xd8", ImageFormat("JPEG", _jpeg_obstacle, "PIL.JpegImagePlugin")),
    (b"GIF87a", _GIF),
    (b"GIF89a", _GIF),
    (b"BM", ImageFormat("BMP", _nothing, "PIL.BmpImagePlugin")),
    (b"P4", _PPM),
    (b"P5", _PPM),
    (b"P6", _PPM),
)
