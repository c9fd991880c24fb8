"""Image files that claim or cost much more than they contain, written byte by byte; run to measure each of them."""

from __future__ import annotations

import io
import random
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from promprune.errors import ImageError
from promprune.runtime import load_image
from tests.support.meter import report

# Formats that Pillow writes: the ones that are read, and others that are refused.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM", "WEBP", "AVIF", "TIFF", "TGA", "ICO", "JPEG2000", "PCX", "SGI", "DDS",
           "IM", "ICNS", "DIB", "MSP", "XBM", "QOI")  # fmt: skip


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def png(width: int, height: int, *chunks: bytes, color: int = 2, depth: int = 8) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def zeros(width: int, height: int, bytes_per_pixel: int) -> bytes:
    """The compressed pixels of a black PNG, without holding them."""
    packer = zlib.compressobj(1)
    row = bytes(1 + width * bytes_per_pixel)
    return chunk(b"IDAT", b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()]))


def webp(width: int, height: int) -> bytes:
    bits = (width - 1) | (height - 1) << 14
    body = b"VP8L" + struct.pack("<IBI", 5, 0x2F, bits) + b"\0" + bytes(12)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def gif(width: int, height: int, extensions: bytes = b"") -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF0, 0, 0) + bytes(6)
    picture = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0;"
    return screen + extensions + picture


def jpeg(*segments: bytes) -> bytes:
    whole = encode(Image.new("RGB", (16, 16)), "JPEG")
    return whole[:2] + b"".join(segments) + whole[2:]


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg_of_many_scans(scans: int, side: int = 4000) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    whole = encode(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * scans + whole[-2:]


def exif_of_overlapping_tags(size: int) -> bytes:
    """Tags whose values are all the same bytes, which a parser copies for every tag."""
    tags = min(65535, size // 24)
    entry = struct.pack("<HI", 1, size - 12 * tags - 20) + struct.pack("<I", 12 * tags + 20)
    entries = b"".join(struct.pack("<H", 0x9000 + i % 0x6000) + entry for i in range(tags))
    return (b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", tags) + entries).ljust(size, b"\0")


HOSTILE: dict[str, Callable[[], bytes]] = {
    "webp 16383 x 10900": lambda: webp(16383, 10900),
    "webp 13000 x 13000": lambda: webp(13000, 13000),
    "gif 13000 x 13000": lambda: gif(13000, 13000),
    "jpeg 13000 x 13000 without data": lambda: jpeg_header(13000, 13000),
    "jpeg 2000": lambda: encode(Image.new("RGB", (1500, 1500)), "JPEG2000"),
    "avif 12000 x 12000 by its header": lambda: avif_of_another_size(12000),
    "png 13300 x 13300": lambda: png(13300, 13300),
    "png 16 bit": lambda: png(13300, 13300, depth=16),
    "png 10^8 x 1": lambda: png(10**8, 1),
    "png 50 million x 1": lambda: png(50 * 10**6, 1),
    "png of a million chunks": lambda: png(8, 8, chunk(b"tIME", bytes(7)) * 10**6),
    "png with 4 MB of exif": lambda: png(8, 8, chunk(b"eXIf", exif_of_overlapping_tags(4_000_000)[6:])),
    "png, text bomb": lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
    "jpeg of 300 scans": lambda: jpeg_of_many_scans(300),
    "jpeg with 20 MB of junk": lambda: jpeg(bytes(20_000_000)),
    "jpeg with 20 MB of fill bytes": lambda: jpeg(b"\xff" * 20_000_000),
    "jpeg with a million comments": lambda: jpeg(segment(0xFE, b"") * 10**6),
    "jpeg with exif in 30 segments": lambda: jpeg(
        *(segment(0xE1, b"Exif\0\0" + exif_of_overlapping_tags(60_000)) for _ in range(30))
    ),
    "gif with 20 MB of comments": lambda: gif(8, 8, b"!\xfe" + (b"\xff" + bytes(255)) * 80_000 + b"\0"),
    "gif with a million short blocks": lambda: gif(8, 8, b"!\xfe" + b"\1a" * 10**6 + b"\0"),
    "ppm with a comment of 50 MB": lambda: b"P6 #" + b"a" * 50_000_000 + b"\n8 8 255\n" + bytes(192),
    "ppm as text": lambda: b"P3 3000 3000 255\n" + b"1 " * 27_000_000,
    "ppm with an odd maximum": lambda: b"P6 4000 4000 254\n" + bytes(48_000_000),
    "bmp, run-length": lambda: bmp_of_runs(),
    "tiff, lzw cut short": lambda: encode(Image.new("RGB", (500, 500)), "TIFF", compression="tiff_lzw")[:-50],
    "tga": lambda: encode(Image.new("RGB", (500, 500)), "TGA"),
    "ico": lambda: encode(Image.new("RGB", (64, 64)), "ICO"),
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    "300 MB of nothing": lambda: b"\x89PNG\r\n\x1a\n" + bytes(300_000_000),
}
# Files within the limits that cost as much as any: they are read.
LARGE: dict[str, Callable[[], bytes]] = {
    "png, 51 million pixels, RGB": lambda: png(8000, 6400, zeros(8000, 6400, 3)),
    "png, 51 million pixels, RGBA": lambda: png(8000, 6400, zeros(8000, 6400, 4), color=6),
    "png, 51 million pixels, LA": lambda: png(8000, 6400, zeros(8000, 6400, 2), color=4),
    "png, 51 million pixels, 16 bit": lambda: png(8000, 6400, zeros(8000, 6400, 2), color=0, depth=16),
    "jpeg, 51 million pixels, 10 scans": lambda: encode(
        Image.new("RGB", (8000, 6400)), "JPEG", progressive=True, subsampling=0
    ),
    "webp, 25 million pixels": lambda: encode(Image.new("RGBA", (5000, 5000)), "WEBP", lossless=True, method=0),
    "avif, 25 million pixels": lambda: encode(Image.new("RGB", (5000, 5000)), "AVIF", speed=10),
    "gif, 51 million pixels": lambda: encode(Image.new("P", (8000, 6400)), "GIF", transparency=0),
    "bmp, 51 million pixels": lambda: encode(Image.new("RGB", (8000, 6400)), "BMP"),
}


def jpeg_header(width: int, height: int) -> bytes:
    whole = bytearray(encode(Image.new("RGB", (16, 16)), "JPEG"))
    place = whole.index(b"\xff\xc0")
    whole[place + 5 : place + 9] = struct.pack(">HH", height, width)
    return bytes(whole[: whole.index(b"\xff\xda") + 14])


def avif_of_another_size(side: int) -> bytes:
    whole = encode(Image.new("RGB", (64, 64)), "AVIF")
    return whole.replace(struct.pack(">II", 64, 64), struct.pack(">II", side, side))


def bmp_of_runs(side: int = 5000) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 0, 0, 0, 256, 0)
    content = bytes(1024) + b"\1\1" * (side * side)
    return b"BM" + struct.pack("<IHHI", 54 + len(content), 0, 0, 54 + 1024) + header + content


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Change some bytes, most of them near the beginning; sometimes cut the file, or repeat a part of it."""
    damaged = bytearray(content)
    for _ in range(chance.randint(1, 12)):
        end = len(damaged) if chance.random() < 0.4 else min(len(damaged), 64)
        damaged[chance.randrange(end)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    if chance.random() < 0.2:
        del damaged[chance.randrange(1, len(damaged)) :]
    if chance.random() < 0.2:
        begin = chance.randrange(len(damaged))
        damaged[begin:begin] = damaged[begin : begin + chance.randrange(1, 200)] * chance.randint(1, 50)
    return bytes(damaged)


def seeds() -> list[bytes]:
    """Small files of every format, in several modes."""
    pixels = np.random.default_rng(0).integers(0, 256, (33, 41, 4), dtype=np.uint8)
    rgba = Image.fromarray(pixels)
    images = [rgba.convert(mode) for mode in ("RGB", "RGBA", "L", "P", "1")]
    found = []
    for kind in FORMATS:
        for image in images:
            try:
                found.append(encode(image, kind))
            except (OSError, ValueError, KeyError):  # Pillow does not write this mode in this format
                continue
    return [*found, encode(images[0], "JPEG", progressive=True), encode(images[1], "WEBP", lossless=True)]


def outcome(content: bytes) -> str:
    """Load an image; return the error that promprune raised on purpose, in one line, or the size of the picture."""
    try:
        image = load_image(content)
    except ImageError as error:
        return f"refused: {error}" if "\n" not in str(error) else "several lines"
    assert image.mode == "RGB"
    return f"{image.width} x {image.height}"


def fuzz(count: int, seed: int) -> Iterator[tuple[str, Callable[[], str]]]:
    chance, files = random.Random(seed), seeds()
    for number in range(count):
        content = mutated(chance.choice(files), chance)
        yield f"{number}", lambda content=content: outcome(content)  # type: ignore[misc]


def main(what: str, *numbers: str) -> None:
    outcome(encode(Image.new("RGB", (8, 8)), "PNG"))  # imports
    if what == "fuzz":
        report(fuzz(*map(int, numbers)))
        return
    for name, make in {"hostile": HOSTILE, "large": LARGE}[what].items():
        content = make()
        report([(name, lambda content=content: outcome(content))])  # type: ignore[misc]


if __name__ == "__main__":
    main(*sys.argv[1:])
