"""Rotary positions of a prompt, for language models that give every token three: time, height and width.

Text counts on all three together. An image lies at one point in time; its tokens have the rows and columns of the
whole grid, whichever of them were kept, and the text behind it goes on as far as behind the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ImagePositions", "PromptPositions", "prompt_positions"]

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ImagePositions:
    """Where the kept tokens of one image lie.

    Attributes:
        offsets: int64 [3, T], from the position at which the image begins.
        extent: how far on the text behind the image begins.
    """

    offsets: Positions
    extent: int


@dataclass(frozen=True, eq=False)
class PromptPositions:
    """Where the tokens of some prompts lie, and those that will follow.

    Attributes:
        ids: int64 [3, batch, length]; 0 where a prompt is padded.
        rope_delta: int64 [batch]; the position of the token behind a prompt is its number of tokens plus this.
    """

    ids: Positions
    rope_delta: npt.NDArray[np.int64]


def prompt_positions(
    is_image: Sequence[npt.NDArray[np.bool_]], images: Sequence[Sequence[ImagePositions]], *, begin: int = 0
) -> PromptPositions:
    """Return the positions of some prompts from their token ``begin`` on, shorter prompts padded on the left.

    Args:
        is_image: bool [length] of every prompt; where the placeholders are, those of one image together.
        images: of every prompt, in the order of their placeholders.
        begin: tokens that are left out.
    """
    longest = max(len(row) for row in is_image)
    ids = np.zeros((3, len(is_image), longest), np.int64)
    rope_delta = np.zeros(len(is_image), np.int64)
    for number, (row, found) in enumerate(zip(is_image, images, strict=True)):
        positions, following = _of_one_prompt(row, found)
        ids[:, number, longest - len(row) :] = positions
        rope_delta[number] = following - len(row)
    return PromptPositions(ids[:, :, begin:], rope_delta)


def _of_one_prompt(is_image: npt.NDArray[np.bool_], images: Sequence[ImagePositions]) -> tuple[Positions, int]:
    """Return the positions of every token, int64 [3, length], and that of the token behind them."""
    places = np.flatnonzero(is_image)
    steps = np.where(is_image, 0, 1)  # how far on the next token begins
    ends = np.cumsum([image.offsets.shape[1] for image in images], dtype=np.int64)
    steps[places[ends - 1]] = [image.extent for image in images]
    begins = np.cumsum(steps) - steps
    positions = np.repeat(begins[None], 3, axis=0)
    if images:
        positions[:, places] += np.concatenate([image.offsets for image in images], axis=1)
    return positions, int(steps.sum())
