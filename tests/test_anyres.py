"""LLaVA-NeXT's crops and their count, held against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from promprune.errors import ImageError, PackageError
from promprune.package.image import AnyresLayout
from promprune.runtime.images.anyres import AnyresPreprocessor, fit_to_canvas, image_token_indices
from promprune.runtime.images.preprocess import load_image
from tests.support.pictures import MODES, PHOTOGRAPHS, synthetic

REAL = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ODD = ((28, 28), (28, 140), (84, 56), (56, 84), (112, 28))


def make_pair(folder: Path, layout: AnyresLayout, **changes: Any) -> tuple[AnyresPreprocessor, Any]:
    """Return our preprocessor and the Hugging Face one, from one preprocessor_config.json."""
    theirs = LlavaNextImageProcessorPil(
        **{
            "size": {"shortest_edge": layout.side},
            "crop_size": {"height": layout.side, "width": layout.side},
            "image_grid_pinpoints": [list(canvas) for canvas in layout.canvases],
            **changes,
        }
    )
    path = folder / "preprocessor_config.json"
    path.write_text(theirs.to_json_string())
    return AnyresPreprocessor.from_file(path, layout), theirs


def crops_of(ours: AnyresPreprocessor, layout: AnyresLayout, image: Image.Image) -> np.ndarray:
    canvas = ours.canvas(image, fit_to_canvas(image.height, image.width, layout))
    return ours.pixel_values([ours.whole(image), canvas])


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_crops_of_photographs_are_hugging_faces(tmp_path: Path, name: str) -> None:
    layout = AnyresLayout(side=336, patches=24, canvases=REAL)
    ours, theirs = make_pair(tmp_path, layout)
    path = Path(skimage.__file__).parent / "data" / name
    expected = theirs(Image.open(path), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(crops_of(ours, layout, load_image(path)), expected)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (1, 2000), (2000, 1), (57, 55), (640, 480)])
def test_crops_of_photographs_of_any_shape_are_hugging_faces(tmp_path: Path, size: tuple[int, int]) -> None:
    layout = AnyresLayout(side=28, patches=2, canvases=ODD)
    ours, theirs = make_pair(tmp_path, layout)
    image = Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png").convert("RGB").resize(size)
    expected = theirs(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(crops_of(ours, layout, image), expected)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_agrees_with_hugging_face(tmp_path: Path, mode: str) -> None:
    layout = AnyresLayout(side=28, patches=2, canvases=ODD)
    ours, theirs = make_pair(tmp_path, layout, do_normalize=False)
    image = synthetic(mode, (61, 47))
    try:
        expected = theirs(image, return_tensors="np")["pixel_values"][0]
    except ValueError:
        with pytest.raises(ImageError):
            load_image(image)
        return
    assert np.abs(crops_of(ours, layout, load_image(image)) - expected).max() <= 1.001 / 255


@given(
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    canvases=st.sampled_from([REAL, ODD, ((336, 336),), ((336, 336), (672, 672), (1344, 336))]),
)
@settings(max_examples=300, deadline=None)
def test_token_indices_are_those_of_transformers(height: int, width: int, canvases: Any) -> None:
    side, patches = (28, 2) if canvases is ODD else (336, 24)
    layout = AnyresLayout(side=side, patches=patches, canvases=canvases)
    fit = fit_to_canvas(height, width, layout)
    canvas = select_best_resolution((height, width), [list(size) for size in canvases])
    assert fit.canvas == tuple(canvas)
    assert fit.resized == get_patch_output_size(np.zeros((1, height, width)), canvas, "channels_first")

    rows, columns = canvas[0] // side, canvas[1] // side
    numbers = torch.arange(rows * columns * patches**2).view(rows, columns, patches, patches, 1)
    unpadded = unpad_image(numbers.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3), (height, width)).flatten()
    expected = np.full(rows * columns * patches**2, -1)
    expected[unpadded.numpy()] = patches**2 + np.arange(len(unpadded))
    indices = image_token_indices(fit, layout)
    np.testing.assert_array_equal(indices[0], np.arange(patches**2))
    np.testing.assert_array_equal(indices[1:].ravel(), expected)

    processor = LlavaNextProcessor.__new__(LlavaNextProcessor)
    processor.image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=[list(size) for size in canvases])
    processor.patch_size, processor.num_additional_image_tokens = side // patches, 0
    tokens = int((indices >= 0).sum()) + len(fit.rows)
    assert tokens == processor._get_number_of_features(height, width, side, side)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"shortest_edge": 56}}, "crops of 28 x 28 pixels from pictures of 56 x 56"),
        ({"crop_size": {"height": 28, "width": 14}}, "crops of 28 x 14"),
        ({"do_resize": False}, "do_resize"),
        ({"image_grid_pinpoints": [[28, 56]]}, "other image_grid_pinpoints"),
        ({"image_std": [0.5, 0.0, 0.5]}, "not finite"),
    ],
)
def test_other_preprocessing_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PackageError, match=message):
        make_pair(tmp_path, AnyresLayout(side=28, patches=2, canvases=ODD), **changes)


def test_the_most_tokens_and_crops_of_an_image() -> None:
    """What engines are built for covers every image, and is reached by one."""
    layout = AnyresLayout(side=336, patches=24, canvases=REAL)
    counts, crops = [], []
    for height, width in [*REAL, (1, 1), (336, 336), (500, 333), (1008, 337)]:
        fit = fit_to_canvas(height, width, layout)
        indices = image_token_indices(fit, layout)
        counts.append(int((indices >= 0).sum()) + len(fit.rows))
        crops.append(int((indices >= 0).any(axis=1).sum()))
    assert max(counts) == layout.max_placeholders(576) == 576 + 48 * 49
    assert max(crops) == layout.max_crops == 5
    assert layout.max_placeholders(69) == 5 * 69
