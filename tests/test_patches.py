"""Patches of an image, against the Hugging Face image processor of Qwen2-VL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from promprune.errors import PackageError
from promprune.runtime.images.grid import GridPreprocessor, PixelRange, choose_grid

SIZE = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over a gradient: edges that a resize has to filter, and levels that it may overshoot."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    noise = random.integers(-60, 60, (height, width, 3))
    return Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8))


@pytest.fixture
def preprocessor(tmp_path: Path) -> GridPreprocessor:
    Qwen2VLImageProcessorPil(size=SIZE).save_pretrained(tmp_path)
    return GridPreprocessor.from_file(tmp_path / "preprocessor_config.json")


@pytest.mark.parametrize(("width", "height"), [(112, 168), (300, 200), (97, 403), (56, 56), (30, 31)])
def test_patches_are_those_of_transformers(preprocessor: GridPreprocessor, width: int, height: int) -> None:
    image = picture(width, height)
    reference = Qwen2VLImageProcessorPil(size=SIZE)(images=[image], return_tensors="np")
    _, rows, columns = (reference["image_grid_thw"][0] // [1, 2, 2]).tolist()
    found = preprocessor.pixel_values(preprocessor.resized(image, rows=rows, columns=columns))
    assert found.shape == (1, rows * columns * preprocessor.group, preprocessor.patch_values)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[0], reference["pixel_values"], rtol=0, atol=1e-6)


def test_another_grid_is_what_transformers_makes_of_the_resized_image(preprocessor: GridPreprocessor) -> None:
    resized = preprocessor.resized(picture(300, 200), rows=5, columns=3)
    assert resized.size == (84, 140)
    reference = Qwen2VLImageProcessorPil(size=SIZE)(images=[resized], return_tensors="np")
    assert reference["image_grid_thw"].tolist() == [[1, 10, 6]]
    np.testing.assert_allclose(preprocessor.pixel_values(resized)[0], reference["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("height", "width", "index"),
    [
        (140, 140, 0),
        (140, 190, 1),
        (190, 140, 2),
        (100, 10_000, 1),
        (600, 700, 3),  # as square as the first, and nearer in size
        (280, 200, 2),
    ],
)
def test_an_image_takes_the_grid_that_distorts_it_least(height: int, width: int, index: int) -> None:
    grids = [(4, 4), (4, 6), (6, 4), (24, 24)]
    assert choose_grid(height, width, grids, PixelRange(side=28, least=3136, most=10**8)) == index


def test_an_image_takes_the_grid_that_transformers_would_give_it() -> None:
    pixels = PixelRange(side=28, least=3136, most=28 * 28 * 1280)
    assert choose_grid(427, 640, [(18, 18), (14, 21), (15, 23)], pixels) == 2  # 14 x 21 distorts it less
    assert choose_grid(427, 640, [(18, 18), (14, 21)], pixels) == 1


@pytest.mark.parametrize(
    ("height", "width"), [(427, 640), (30, 31), (5, 900), (4000, 3000), (57, 1000), (28, 5600), (1, 200)]
)
def test_the_size_is_that_of_transformers(height: int, width: int) -> None:
    for least, most in ((3136, 50_176), (3136, 12_845_056), (100_352, 602_112)):
        rows, columns = smart_resize(height, width, 28, least, most)
        found = PixelRange(side=28, least=least, most=most).shape_of(height, width)
        assert found == (rows // 28, columns // 28)


def test_a_strip_that_transformers_refuses_takes_the_closest_grid() -> None:
    pixels = PixelRange(side=28, least=3136, most=10**8)
    assert pixels.shape_of(10, 2001) is None
    assert choose_grid(10, 2001, [(4, 4), (4, 6)], pixels) == 1


@pytest.mark.parametrize("change", ['"patch_size": 0', '"do_resize": false', '"merge_size": "two"'])
def test_an_unusable_file_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(f"{{{change}}}")
    with pytest.raises(PackageError):
        GridPreprocessor.from_file(path)
