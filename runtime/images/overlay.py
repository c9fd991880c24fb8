"""Drawing the kept tokens: the view of the model, with dropped patches dimmed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, TypeAlias

from promprune.errors import ImageError
from promprune.runtime.images.encoded import TokenGrid, TokenSelection

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["COVERAGE_COLOUR", "SALIENCY_COLOUR", "draw_kept_tokens"]

Box: TypeAlias = tuple[int, int, int, int]  # left, top, right, bottom, in pixels

SALIENCY_COLOUR: Final = (255, 140, 0)  # orange: stage 1
COVERAGE_COLOUR: Final = (0, 190, 255)  # sky blue: stage 2; distinguishable with every kind of colour vision
_RANDOM_COLOUR: Final = (200, 200, 200)
_BACKGROUND: Final = (22, 24, 29)
_TEXT: Final = (235, 235, 235)
_MIN_SIDE_PIXELS: Final = 896  # smaller images are enlarged by an integer factor
_DIMMED: Final = 0.36  # brightness of dropped patches


def draw_kept_tokens(view: Image, selection: TokenSelection) -> Image:
    """Draw the kept visual tokens over an image.

    Args:
        view: the view of the model (``pipeline.encoder.view(path)``), RGB.
        selection: the selection in a result or an encoded image.

    Returns:
        An RGB image, at least 896 pixels wide, with a legend below.

    Raises:
        ImageError: the image does not have the size of the view.
    """
    seen = (max(g.left + g.width for g in selection.grids), max(g.top + g.height for g in selection.grids))
    if view.size != seen:
        raise ImageError(
            f"received an image of {view.width} x {view.height} pixels",
            expected=f"{seen[0]} x {seen[1]}, the size of the model's view",
            fix="use pipeline.encoder.view(image)",
        )
    from PIL import Image as PILImage

    scale = max(1, -(-_MIN_SIDE_PIXELS // min(view.size)))
    size = (view.width * scale, view.height * scale)
    bright = view.convert("RGB").resize(size, resample=PILImage.Resampling.LANCZOS)
    dark = bright.point([round(level * _DIMMED) for level in range(256)] * 3)
    patches = [box for grid in selection.grids for box in _patches(grid, scale)]
    boxes = [patches[token] for token in selection.token_indices.tolist()]
    kept = PILImage.new("L", size, 0)
    for box in boxes:
        kept.paste(255, box)
    picture = PILImage.composite(bright, dark, kept)
    _outline(picture, boxes, _colours(selection))
    return _add_legend(picture, selection)


def _patches(grid: TokenGrid, scale: int) -> Iterator[Box]:
    """Yield the box of every patch of a grid, in raster order, in a view that was enlarged by ``scale``."""
    for token in range(grid.num_tokens):
        row, column = divmod(token, grid.columns)
        yield (
            scale * grid.left + scale * grid.width * column // grid.columns,
            scale * grid.top + scale * grid.height * row // grid.rows,
            scale * grid.left + scale * grid.width * (column + 1) // grid.columns,
            scale * grid.top + scale * grid.height * (row + 1) // grid.rows,
        )


def _colours(selection: TokenSelection) -> list[tuple[int, int, int]]:
    if selection.saliency_mask is None:
        return []
    if selection.policy == "random":
        return [_RANDOM_COLOUR] * selection.keep_tokens
    return [SALIENCY_COLOUR if salient else COVERAGE_COLOUR for salient in selection.saliency_mask.tolist()]


def _outline(picture: Image, boxes: list[Box], colours: list[tuple[int, int, int]]) -> None:
    """Frame every kept patch; draw nothing in a package without selection, which keeps all."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(picture)
    for (left, top, right, bottom), colour in zip(boxes, colours, strict=False):
        width = max(2, (right - left) // 14)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=width)


def _add_legend(picture: Image, selection: TokenSelection) -> Image:
    from PIL import Image as PILImage
    from PIL import ImageDraw, ImageFont

    size = max(12.0, picture.width / 48)
    font = ImageFont.load_default(size)
    pad = round(size * 0.7)
    canvas = PILImage.new("RGB", (picture.width, picture.height + round(size) + 2 * pad), _BACKGROUND)
    canvas.paste(picture)
    draw = ImageDraw.Draw(canvas)
    x, y = float(pad), picture.height + pad
    for colour, text in _legend(selection):
        if colour is not None:
            draw.rectangle((x, y + size * 0.12, x + size * 0.8, y + size * 0.92), fill=colour)
            x += size * 1.15
        draw.text((x, y), text, fill=_TEXT, font=font)
        x += draw.textlength(text, font=font) + size * 1.3
    return canvas


def _legend(selection: TokenSelection) -> list[tuple[tuple[int, int, int] | None, str]]:
    T, N = selection.keep_tokens, selection.num_tokens
    if not selection.ran:
        return [(None, f"all {N} visual tokens kept; no selection in this package")]
    kept, entropy = f"{T} of {N} tokens ({T / N:.1%})", f"entropy {selection.spectral_entropy:.3f}"
    if selection.policy == "random":
        return [(None, kept), (_RANDOM_COLOUR, "at random"), (None, entropy)]
    saliency = selection.saliency_count or 0
    return [
        (None, kept),
        (SALIENCY_COLOUR, f"saliency {saliency}"),
        (COVERAGE_COLOUR, f"coverage {T - saliency}"),
        (None, entropy),
    ]
