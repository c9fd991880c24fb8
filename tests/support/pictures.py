"""Pictures for tests of preprocessing: scikit-image's photographs, and noise in all modes of Pillow."""

from __future__ import annotations

import numpy as np
from PIL import Image

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "camera.png", "retina.jpg", "logo.png")
MODES = ("1", "L", "LA", "La", "P", "RGB", "RGBA", "RGBa", "PA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16")


def synthetic(mode: str, size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(size[0] * 1000 + size[1])
    if mode in ("I", "F", "I;16"):
        dtype = {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
        return Image.fromarray(rng.integers(0, 300, (size[1], size[0])).astype(dtype))
    rgba = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8))
    if mode == "PA":
        return rgba.convert("P").convert("PA")
    if mode == "LAB":
        return Image.frombytes("LAB", size, rgba.convert("RGB").tobytes())
    return (
        rgba.convert("LA").convert("La")
        if mode == "La"
        else rgba.convert(mode)
        if mode != "HSV"
        else (rgba.convert("RGB").convert("HSV"))
    )
