"""Hostile images: one clear line, and a bounded amount of CPU time and memory."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from promprune.errors import ImageError
from promprune.runtime import RuntimeConfig, load_image
from tests.support.hostile_images import HOSTILE, LARGE, png, zeros
from tests.support.meter import run_limited

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and peak memory are read from Linux")

HARNESS = "tests.support.hostile_images"
SECONDS = 2.0  # of CPU time
BYTES_PER_PIXEL = 12  # of memory, as documented


def test_hostile_images_are_refused_before_they_are_decoded() -> None:
    costs, stderr = run_limited(HARNESS, "hostile", cpu_seconds=60, memory_mb=3000)
    assert [cost["name"] for cost in costs] == list(HOSTILE)
    assert stderr == ""
    for cost in costs:
        assert cost["outcome"].startswith("done: refused: the image"), cost
        assert cost["seconds"] < SECONDS, cost
        assert cost["megabytes"] < 100, cost


def test_damaged_images_of_twenty_formats_cost_little() -> None:
    assert_cheap(*run_limited(HARNESS, "fuzz", "250", "1", cpu_seconds=60, memory_mb=3000), count=250)


@pytest.mark.slow
def test_three_thousand_damaged_images_cost_little() -> None:
    assert_cheap(*run_limited(HARNESS, "fuzz", "3000", "0", cpu_seconds=600, memory_mb=3000), count=3000)


def assert_cheap(costs: list[dict[str, object]], stderr: str, *, count: int) -> None:
    assert stderr == ""
    assert len(costs) == count
    for cost in costs:
        assert str(cost["outcome"]).startswith("done: "), cost
        assert float(str(cost["seconds"])) < SECONDS, cost
        assert float(str(cost["megabytes"])) < BYTES_PER_PIXEL * RuntimeConfig.max_image_pixels / 2**20, cost
    assert sum("refused" not in str(cost["outcome"]) for cost in costs) > count / 20  # some are still pictures


@pytest.mark.slow
def test_the_largest_images_stay_within_the_stated_memory_and_time() -> None:
    costs, stderr = run_limited(HARNESS, "large", cpu_seconds=120, memory_mb=6000)
    assert [cost["name"] for cost in costs] == list(LARGE)
    assert stderr == ""
    for cost in costs:
        assert "refused" not in cost["outcome"], cost
        assert cost["seconds"] < SECONDS, cost
        assert cost["megabytes"] < BYTES_PER_PIXEL * RuntimeConfig.max_image_pixels / 2**20, cost


def test_the_limit_can_be_changed() -> None:
    content = png(40, 30, zeros(40, 30, 3))
    assert load_image(content, max_pixels=1200).size == (40, 30)
    with pytest.raises(ImageError, match=r"too many pixels \(40 x 30\); expected at most 1199"):
        load_image(content, max_pixels=1199)
    with pytest.raises(ImageError, match="too many pixels"):
        load_image(np.zeros((30, 40, 3), np.uint8), max_pixels=1199)
    with pytest.raises(ImageError, match="too many pixels"):
        load_image(Image.new("RGB", (40, 30)), max_pixels=1199)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_strips_of_a_transparent_picture_equal_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promprune.runtime.images.preprocess._STRIP_PIXELS", 100)
    pixels = np.random.default_rng(0).integers(0, 256, (31, 27, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(whole))


def test_a_large_jpeg_is_decoded_at_a_smaller_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promprune.runtime.images.preprocess._FULL_SIZE_PIXELS", 10_000)
    y, x = np.mgrid[:301, :401]
    image = Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8).clip(40, 200))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=95)
    smaller = load_image(stream.getvalue())
    assert smaller.size == (101, 76)  # a quarter: half of it still has more than 10,000 pixels
    expected = np.asarray(image.resize(smaller.size, Image.Resampling.BOX), np.float32)
    assert np.abs(np.asarray(smaller, np.float32) - expected).mean() < 6


def test_a_picture_of_the_caller_is_not_shared() -> None:
    image = Image.new("RGB", (4, 4))
    load_image(image).putpixel((0, 0), (255, 0, 0))
    assert image.getpixel((0, 0)) == (0, 0, 0)
