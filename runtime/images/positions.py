"""Rotary positions of a prompt, for language models that give every token three: time, height and width.

For text, all three increase together. All tokens of an image have the same time; kept tokens have their rows and
columns in the full grid, and the text after the image continues as if all tokens had been kept.
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
    """The rotary positions of the kept tokens of one image.

    Attributes:
        offsets: int64 [3, T], relative to the position at which the image begins.
        extent: distance from the beginning of the image to the text after it.
    """

    offsets: Positions
    extent: int


@dataclass(frozen=True, eq=False)
class PromptPositions:
    """The rotary positions of the tokens of some prompts, and of the tokens that will follow.

    Attributes:
        ids: int64 [3, batch, length]; 0 for padding.
        rope_delta: int64 [batch]; the position of the token after a prompt is its number of tokens plus this.
    """

    ids: Positions
    rope_delta: npt.NDArray[np.int64]


def prompt_positions(
    is_image: Sequence[npt.NDArray[np.bool_]], images: Sequence[Sequence[ImagePositions]], *, begin: int = 0
) -> PromptPositions:
    """Return the positions of some prompts, without their first ``begin`` tokens, with padding on the left.

    Args:
        is_image: for every prompt bool [length], true for placeholders; those of one image are adjacent.
        images: for every prompt the positions of its images, in order.
        begin: number of tokens to omit.
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
    """Return the positions of every token, int64 [3, length], and that of the token after them."""
    places = np.flatnonzero(is_image)
    steps = np.where(is_image, 0, 1)  # distance to the next token
    ends = np.cumsum([image.offsets.shape[1] for image in images], dtype=np.int64)
    steps[places[ends - 1]] = [image.extent for image in images]
    begins = np.cumsum(steps) - steps
    positions = np.repeat(begins[None], 3, axis=0)
    if images:
        positions[:, places] += np.concatenate([image.offsets for image in images], axis=1)
    return positions, int(steps.sum())
