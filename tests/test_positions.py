"""Rotary positions of prompts, compared with transformers' ``get_rope_index`` for images with all tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from promprune.runtime.images.grid import grid_positions
from promprune.runtime.images.positions import ImagePositions, prompt_positions
from tests.support.tiny_models import tiny_qwen2_5_vl

IMAGE_TOKEN_ID = 3
Grid = tuple[int, int]


def prompt(*parts: int | Grid) -> tuple[list[int], list[Grid]]:
    """Token ids of a prompt made of texts (their lengths) and images (rows and columns), and its grids."""
    ids: list[int] = []
    for part in parts:
        ids += [7] * part if isinstance(part, int) else [IMAGE_TOKEN_ID] * (part[0] * part[1])
    return ids, [part for part in parts if not isinstance(part, int)]


PROMPTS = [
    prompt(3, (4, 6), 5),
    prompt(2, (2, 3), 1, (5, 2), 4),
    prompt(9),
    prompt((3, 3), 1),
    prompt(1, (2, 7)),
]


def rope_index(ids: list[list[int]], mask: list[list[int]], grids: list[Grid]) -> tuple[np.ndarray, np.ndarray]:
    input_ids = torch.tensor(ids)
    positions, delta = tiny_qwen2_5_vl().model.get_rope_index(
        input_ids,
        mm_token_type_ids=(input_ids == IMAGE_TOKEN_ID).int(),
        image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids] or [[1, 2, 2]]),
        attention_mask=torch.tensor(mask),
    )
    return positions.numpy(), delta[:, 0].numpy()


def whole(grid: Grid) -> ImagePositions:
    return grid_positions(np.arange(grid[0] * grid[1]), rows=grid[0], columns=grid[1])


def test_whole_images_lie_where_transformers_puts_them() -> None:
    longest = max(len(ids) for ids, _ in PROMPTS)
    padding = [longest - len(ids) for ids, _ in PROMPTS]
    positions, delta = rope_index(
        [[0] * pad + ids for pad, (ids, _) in zip(padding, PROMPTS, strict=True)],
        [[0] * pad + [1] * len(ids) for pad, (ids, _) in zip(padding, PROMPTS, strict=True)],
        [grid for _, grids in PROMPTS for grid in grids],
    )
    found = prompt_positions(
        [np.array(ids) == IMAGE_TOKEN_ID for ids, _ in PROMPTS], [list(map(whole, grids)) for _, grids in PROMPTS]
    )
    np.testing.assert_array_equal(found.ids, positions)
    np.testing.assert_array_equal(found.rope_delta, delta)


@pytest.mark.parametrize("index", [0, 1])
def test_kept_tokens_stay_where_they_were(index: int) -> None:
    """Dropped tokens do not change the positions of the kept tokens, nor those of the text."""
    ids, grids = PROMPTS[index]
    positions, delta = rope_index([ids], [[1] * len(ids)], grids)
    random = np.random.default_rng(index)
    kept = [np.sort(random.choice(rows * columns, 3, replace=False)) for rows, columns in grids]
    is_image = np.array(ids) == IMAGE_TOKEN_ID
    stays, firsts = ~is_image, np.flatnonzero(is_image)
    for (rows, columns), indices in zip(grids, kept, strict=True):
        stays[firsts[indices]] = True
        firsts = firsts[rows * columns :]
    images = [
        grid_positions(indices, rows=rows, columns=columns)
        for (rows, columns), indices in zip(grids, kept, strict=True)
    ]
    found = prompt_positions([is_image[stays]], [images])
    np.testing.assert_array_equal(found.ids[:, 0], positions[:, 0, stays])
    assert found.rope_delta[0] + stays.sum() == delta[0] + len(ids)


def test_a_part_of_a_prompt_has_the_positions_it_has_in_the_whole() -> None:
    ids, grids = PROMPTS[1]
    is_image, images = np.array(ids) == IMAGE_TOKEN_ID, list(map(whole, grids))
    everything, rest = (prompt_positions([is_image], [images], begin=begin) for begin in (0, 9))
    np.testing.assert_array_equal(rest.ids, everything.ids[:, :, 9:])
    np.testing.assert_array_equal(rest.rope_delta, everything.rope_delta)


def test_an_image_alone_by_hand() -> None:
    found = prompt_positions(
        [np.array([False, True, True, False])], [[grid_positions(np.array([1, 5]), rows=2, columns=3)]]
    )
    assert found.ids[:, 0].tolist() == [[0, 1, 1, 4], [0, 1, 2, 4], [0, 2, 3, 4]]
    assert found.rope_delta.tolist() == [1]
