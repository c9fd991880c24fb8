"""LLaVA-OneVision packages against transformers: inputs of the language model, logits, answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
)

from promprune.errors import UnsupportedModelError
from promprune.export import ExportResult
from promprune.export.checkpoint.loading import load_checkpoint
from promprune.package.image import AnyresLayout
from promprune.runtime import VisionLanguagePipeline, draw_kept_tokens
from promprune.runtime.images.anyres import AnyresPreprocessor, fit_to_canvas, resize_bilinearly, token_grids
from tests.support.crops import KEEP, SIZES, CropsReference, assert_all_ways_agree, assert_close, picture, prefill
from tests.support.shared import Shared
from tests.support.tiny_models import IMAGE_SIZE, save_tiny_llava_onevision

BATCH = [
    ([picture((120, 40))], "What is it?"),
    ([picture((64, 64), 1), picture((30, 90), 2)], "Which of the two is larger, the first or the second?"),
    ([], "No image"),
]


@pytest.fixture(scope="module")
def reference(tiny_onevision: Path) -> CropsReference:
    return CropsReference(tiny_onevision)


@pytest.fixture(scope="module")
def full(tiny_onevision: Path, shared: Shared) -> Any:
    export = shared.export("onevision-full", tiny_onevision, ratio=1.0, verify=False)
    with VisionLanguagePipeline.from_package(export.output, provider="cpu", num_threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def pruned(onevision_export: ExportResult) -> Any:
    with VisionLanguagePipeline.from_package(onevision_export.output, provider="cpu", num_threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_with_nothing_removed_the_language_model_gets_transformers_inputs(
    full: Any, reference: CropsReference, size: tuple[int, int]
) -> None:
    """Shrunk if there are more tokens than those of two crops, with a newline after every row."""
    image = picture(size)
    embeds, _, logits = prefill(full, [([image], "What is it?")])
    expected, expected_logits = reference.whole([image], "What is it?")
    assert_close(embeds[0], expected, "fp32")
    assert_close(logits[0], expected_logits, "fp32")


def test_batches_and_several_images_with_nothing_removed(full: Any, reference: CropsReference) -> None:
    embeds, mask, logits = prefill(full, BATCH)
    for row, (images, question) in enumerate(BATCH):
        expected, expected_logits = reference.whole(images, question)
        assert_close(embeds[row, -len(expected) :], expected, "fp32")
        assert mask[row].sum() == len(expected)
        assert_close(logits[row], expected_logits, "fp32")


@torch.no_grad()
def test_answers_with_nothing_removed_are_generates(full: Any, reference: CropsReference) -> None:
    for images, question in BATCH:
        inputs = reference.inputs(images, question)
        expected = reference.model.generate(**inputs, max_new_tokens=32, do_sample=False)
        result = full.generate(images, question, max_new_tokens=32)
        assert list(result.token_ids) == expected[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("size", [size for size in SIZES if min(size) > 1], ids=str)
def test_pruned_inputs_are_the_tokens_that_the_method_chooses(
    pruned: Any, reference: CropsReference, size: tuple[int, int]
) -> None:
    image = picture(size)
    embeds, _, logits = prefill(pruned, [([image], "What is it?")])
    expected, expected_logits = reference.pruned([image], "What is it?")
    assert_close(embeds[0], expected, "fp32")
    assert_close(logits[0], expected_logits, "fp32")


@pytest.mark.slow
@torch.no_grad()
def test_kept_sets_of_fifty_pictures(pruned: Any, reference: CropsReference) -> None:
    """Parts of photographs in random places and sizes."""
    random, equal = np.random.default_rng(0), 0
    for index in range(50):
        photograph = picture((400, 300), index)
        width, height = (int(random.integers(size // 4, size)) for size in photograph.size)
        left, top = int(random.integers(0, 401 - width)), int(random.integers(0, 301 - height))
        part = photograph.crop((left, top, left + width, top + height))
        wanted, found = reference.kept(part, alone=True).numpy(), pruned.encode_image(part).image_features
        equal += wanted.shape == found.shape and np.allclose(found, wanted, rtol=0, atol=1e-3 * wanted.std())
    assert equal >= 49


def test_pruned_batches_streams_chats_and_several_images(pruned: Any, reference: CropsReference) -> None:
    assert_all_ways_agree(pruned, reference, BATCH)
    chat = pruned.chat()
    chat.ask("Which?", BATCH[1][0], max_new_tokens=4)
    again = chat.ask("And why?", max_new_tokens=4)
    assert again.token_ids == pruned.generate(BATCH[1][0], chat.messages[:-1], max_new_tokens=4).token_ids
    assert again.timings.reused_tokens > 20


def test_one_of_several_images_is_one_crop(pruned: Any, full: Any) -> None:
    image = picture((120, 40))
    for pipeline in (pruned, full):
        selection = pipeline.encode_image(image, alone=False).selection
        assert [(grid.rows, grid.columns) for grid in selection.grids] == [(4, 4)]
        view = pipeline.encoder.view(image, alone=False)
        assert view.size == (IMAGE_SIZE, IMAGE_SIZE)
        draw_kept_tokens(view, selection)
        encoded = [pipeline.encode_image(each, alone=False) for each in BATCH[1][0]]
        again = pipeline.generate(encoded, BATCH[1][1], max_new_tokens=6).token_ids
        assert again == pipeline.generate(*BATCH[1], max_new_tokens=6).token_ids


def test_every_crop_of_a_large_image_keeps_tokens(pruned: Any) -> None:
    selection = pruned.encode_image(picture((112, 168))).selection
    assert selection.num_tokens == 16 + 8 * 12
    assert selection.keep_tokens == 7 * KEEP


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    sides=st.sampled_from([((384, 384), (768, 1152), (2304, 2304), (384, 2304)), ((384, 768), (1536, 384))]),
)
@settings(max_examples=200, deadline=None)
def test_placeholders_are_counted_like_transformers(height: int, width: int, sides: Any) -> None:
    layout = AnyresLayout(side=384, patches=27, canvases=sides, shrink_to_crops=9, one_crop_each=True)
    _, *shown = token_grids(fit_to_canvas(height, width, layout), layout)
    rows, columns = layout.shrunk(shown[0].rows, shown[0].columns) if shown else (0, 0)
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    processor.image_processor = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=[list(side) for side in sides])
    processor.num_image_tokens, processor.vision_aspect_ratio = 27**2, "anyres_max_9"
    expected = processor._get_number_of_features(height, width, 384, 384)
    assert 27**2 + rows * (columns + 1) == expected
    assert expected <= layout.max_placeholders(27**2)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (9, 2), (13, 13)])
def test_features_are_resized_like_torch(rows: int, columns: int) -> None:
    values = torch.randn(13, 9, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(values.permute(2, 0, 1)[None], (rows, columns), mode="bilinear")[0]
    found = resize_bilinearly(values.numpy(), rows, columns)
    np.testing.assert_allclose(found, expected.permute(1, 2, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(56, 56), (1, 1), (61, 47), (640, 427), (31, 500), (500, 31)])
def test_crops_are_those_of_the_image_processor(
    onevision_export: ExportResult, reference: CropsReference, size: tuple[int, int]
) -> None:
    layout: Any = onevision_export.manifest.image.layout
    ours = AnyresPreprocessor.from_file(onevision_export.output / "preprocessor_config.json", layout)
    image = picture(size)
    canvas = ours.canvas(image, fit_to_canvas(image.height, image.width, layout))
    alone, several = (reference.image_processor([[image] * count], return_tensors="np") for count in (1, 2))
    np.testing.assert_array_equal(ours.pixel_values([ours.whole(image), canvas]), alone["pixel_values"][0])
    np.testing.assert_array_equal(ours.pixel_values([ours.squared(image)]), several["pixel_values"][0])


def test_an_unknown_way_to_shrink_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_llava_onevision(tmp_path / "checkpoint", vision_aspect_ratio="anyres")
    checkpoint = load_checkpoint(str(folder))
    with pytest.raises(UnsupportedModelError, match="vision_aspect_ratio = 'anyres'; expected 'anyres_max_'"):
        checkpoint.family(checkpoint.meta_model, checkpoint.processor)
