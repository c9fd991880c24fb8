"""The image preprocessing, held against the Hugging Face image processors."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from promprune.errors import ImageError, PackageError
from promprune.runtime.images.crop import CropPreprocessor
from promprune.runtime.images.preprocess import load_image
from tests.support.pictures import MODES, PHOTOGRAPHS, synthetic

STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)[:, None, None]


def make_pair(tmp_path: Path, side: int, kind: str = "CLIPImageProcessorPil", **changes: object):
    """Return our preprocessor and the Hugging Face one, from one preprocessor_config.json."""
    import transformers

    crop = {"height": side, "width": side}
    theirs = getattr(transformers, kind)(size={"shortest_edge": side}, crop_size=crop, **changes)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(theirs.to_json_string())
    return CropPreprocessor.from_file(path, height=side, width=side), theirs


def assert_within_one_level(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    assert np.abs((ours - theirs) * STD).max() <= 1.001 / 255


@pytest.mark.parametrize("side", [224, 336])
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_agree_with_hugging_face(tmp_path: Path, name: str, side: int) -> None:
    path = Path(skimage.__file__).parent / "data" / name
    ours, theirs = make_pair(tmp_path, side)
    expected = theirs(Image.open(path), return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(ours(load_image(path)), expected)


SIZES = ((1, 1), (7, 300), (300, 7), (31, 29), (56, 56), (400, 401))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_agrees_with_hugging_face(tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    image = synthetic(mode, size)
    assert image.mode == mode
    ours, theirs = make_pair(tmp_path, 56)
    try:
        expected = theirs(image, return_tensors="np")["pixel_values"]
    except ValueError:
        with pytest.raises(ImageError):
            load_image(image)
        return
    assert_within_one_level(ours(load_image(image)), expected)


@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    side=st.integers(1, 40),
    shortest=st.integers(1, 60),
    resample=st.sampled_from([0, 1, 2, 3, 4, 5]),
)
@settings(max_examples=60, deadline=None)
def test_any_size_agrees_with_hugging_face(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, side: int, shortest: int, resample: int
) -> None:
    from transformers import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": shortest}, crop_size={"height": side, "width": side + 1}, resample=resample
    )
    path = tmp_path_factory.mktemp("any") / "preprocessor_config.json"
    path.write_text(theirs.to_json_string())
    ours = CropPreprocessor.from_file(path, height=side, width=side + 1)
    image = synthetic("RGB", (width, height))
    expected = theirs(image, return_tensors="np")["pixel_values"]
    assert_within_one_level(ours(image), expected)


@pytest.mark.parametrize("size", [(3000, 9), (9, 3000), (20000, 400), (5000, 1), (1, 20000), (200, 30000)])
def test_very_long_images_agree_with_hugging_face(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promprune.runtime.images.crop._LARGE_PIXELS", 10_000)
    ours, theirs = make_pair(tmp_path, 32)
    y, x = np.mgrid[: size[1], : size[0]] * 0.37
    waves = [128 + 120 * np.sin(x * (k + 1) / 3) * np.cos(y / (k + 2)) for k in range(3)]
    image = Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))
    assert_within_one_level(ours(image), theirs(image, return_tensors="np")["pixel_values"])


def test_a_very_long_image_needs_little_memory(tmp_path: Path) -> None:
    ours, _ = make_pair(tmp_path, 336)
    assert ours(synthetic("RGB", (60000, 1))).shape == (1, 3, 336, 336)  # in full: 336 x 20 million pixels


@pytest.mark.parametrize(
    "changes",
    [
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_switches_are_honoured(tmp_path: Path, changes: dict[str, object]) -> None:
    ours, theirs = make_pair(tmp_path, 40, **changes)
    image = synthetic("RGB", (61, 47))
    np.testing.assert_array_equal(ours(image), theirs(image, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (41, 41)])
def test_llava_padding_to_a_square(tmp_path: Path, size: tuple[int, int]) -> None:
    ours, theirs = make_pair(tmp_path, 40, kind="LlavaImageProcessorPil", do_pad=True)
    image = synthetic("RGB", size)
    assert_within_one_level(ours(image), theirs(image, return_tensors="np")["pixel_values"])


def test_a_fixed_size_without_a_crop(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(size={"height": 30, "width": 20}, do_center_crop=False)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(theirs.to_json_string())
    image = synthetic("RGB", (64, 48))
    ours = CropPreprocessor.from_file(path, height=30, width=20)
    np.testing.assert_array_equal(ours(image), theirs(image, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright_like_load_image(tmp_path: Path, orientation: int) -> None:
    from transformers.image_utils import load_image as load_reference

    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    synthetic("RGB", (40, 24)).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(load_reference(str(path))))


def test_arrays_bytes_and_files_are_one_picture(tmp_path: Path) -> None:
    image = synthetic("RGB", (33, 21))
    path = tmp_path / "wrong-extension.jpg"
    image.save(path, format="PNG")
    for source in (path, str(path), path.read_bytes(), image, np.asarray(image)):
        np.testing.assert_array_equal(np.asarray(load_image(source)), np.asarray(image))


def test_hostile_files_are_refused_in_one_line(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    synthetic("RGB", (64, 64)).save(encoded, format="PNG")
    contents = {
        "empty.png": b"",
        "not an image, text.png": b"this is no picture\n" * 10,
        "truncated.png": encoded.getvalue()[:3000],
        "damaged or truncated, header.png": encoded.getvalue()[:20],
        "not an image, postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "too many pixels, bomb.bmp": b"BM"
        + bytes(12)
        + b"(\0\0\0"
        + (60000).to_bytes(4, "little") * 2
        + b"\1\0\x18\0"
        + bytes(24),
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ImageError) as caught:
            load_image(path)
        assert name in str(caught.value)
        assert name.split(",")[0].split(".")[0] in str(caught.value).replace(str(path), "")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.png", ".", "a\0b.png", "x" * 5000])
def test_paths_that_are_no_file_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError):
        load_image(str(tmp_path / name))


@pytest.mark.parametrize("source", ["https://example.com/a.png", "data:image/png;base64,AAAA"])
def test_addresses_are_not_fetched(source: str) -> None:
    with pytest.raises(ImageError, match="download it first"):
        load_image(source)


@pytest.mark.parametrize(
    "source",
    [
        None,
        3,
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_other_sources_are_refused(source: object) -> None:
    with pytest.raises(ImageError, match="expected"):
        load_image(source)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of damaged metadata
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "AVIF", "WEBP", "PPM"]))
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_read_or_refused(data: st.DataObject, kind: str) -> None:
    encoded = io.BytesIO()
    synthetic("RGB", (24, 17)).save(encoded, format=kind)
    content = bytearray(encoded.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(content)))
    with contextlib.suppress(ImageError):
        assert load_image(bytes(content[:end])).mode == "RGB"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"size": "big"}',
        b'{"size": {"longest_edge": 30}, "crop_size": 32}',
        b'{"size": {"shortest_edge": 0}}',
        b'{"crop_size": {"height": 32}}',
        b'{"do_center_crop": false}',
        b'{"do_pad": true, "crop_size": 32}',
        b'{"image_mean": [0.5], "crop_size": 32}',
        b'{"resample": 9, "crop_size": 32}',
        b'{"crop_size": 31}',
        b'{"crop_size": 32, "image_std": [0.5, 0, 0.5]}',
        b'{"crop_size": 32, "rescale_factor": 1e300}',
        b"\xff\xfe",
    ],
)
def test_unusable_configs_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_bytes(content)
    with pytest.raises(PackageError):
        CropPreprocessor.from_file(path, height=32, width=32)


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="nowhere"):
        CropPreprocessor.from_file(tmp_path / "nowhere.json", height=32, width=32)


def test_sizes_as_plain_numbers(tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"size": 32, "crop_size": 32}))
    assert CropPreprocessor.from_file(path, height=32, width=32)(synthetic("RGB", (50, 40))).shape == (1, 3, 32, 32)
