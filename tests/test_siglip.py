"""LLaVA with a SigLIP tower, which has no CLS token, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, SiglipImageProcessorPil

from promprune.errors import UnsupportedModelError
from promprune.export import ExportResult, export_package
from promprune.export.config import ExportConfig
from promprune.export.families.llava import Llava
from promprune.method.reference import select_tokens
from promprune.runtime import VisionLanguagePipeline, draw_kept_tokens
from promprune.runtime.images.crop import CropPreprocessor
from tests.support.hugging_face import PHOTOGRAPHS, QUESTIONS, Reference, messages_of
from tests.support.shared import Shared
from tests.support.tiny_models import PATCH_SIZE, SIGLIP_IMAGE_SIZE, save_tiny_llava, save_tiny_siglip_llava


@pytest.fixture(scope="module")
def full(tiny_siglip: Path, shared: Shared) -> ExportResult:
    """The unpruned baseline."""
    return shared.export("siglip-full", tiny_siglip, ratio=1.0, verify=False)


@pytest.fixture(scope="module")
def reference(tiny_siglip: Path) -> Reference:
    return Reference(tiny_siglip)


@pytest.fixture(params=["pruned", "unpruned"])
def pipeline(request: pytest.FixtureRequest, siglip_export: ExportResult, full: ExportResult) -> Any:
    export = siglip_export if request.param == "pruned" else full
    with VisionLanguagePipeline.from_package(export.output, provider="cpu", num_threads=1) as loaded:
        yield loaded


def test_saliency_is_the_attention_that_patches_receive(tiny_siglip: Path) -> None:
    eager = LlavaForConditionalGeneration.from_pretrained(tiny_siglip, attn_implementation="eager").eval()
    pixel_values = torch.randn(3, 3, SIGLIP_IMAGE_SIZE, SIGLIP_IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attentions = eager.model.vision_tower(pixel_values, output_attentions=True).attentions
        encoder = Llava(eager, AutoProcessor.from_pretrained(tiny_siglip)).vision_modules[0].module
        features, saliency = encoder(pixel_values)
        wanted = torch.stack(list(eager.get_image_features(pixel_values, return_dict=True).pooler_output))
    torch.testing.assert_close(saliency, attentions[-1].mean(dim=(1, 2)))
    torch.testing.assert_close(saliency.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(features, wanted)


@pytest.mark.parametrize("save", [save_tiny_llava, save_tiny_siglip_llava])
@torch.no_grad()
def test_features_of_several_layers_are_side_by_side(save: Any, tmp_path: Path) -> None:
    """As in Granite Vision; the saliency is that of the last of them."""
    folder = save(tmp_path / "checkpoint", vision_feature_layer=[-3, 0, -1])
    eager = LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(folder)
    pixel_values = processor.image_processor([Image.open(path) for path in PHOTOGRAPHS], return_tensors="pt")[
        "pixel_values"
    ]
    attention = eager.model.vision_tower(pixel_values, output_attentions=True).attentions[-1].mean(dim=1)
    features, saliency = Llava(eager, processor).vision_modules[0].module(pixel_values)
    wanted = torch.stack(list(eager.get_image_features(pixel_values, return_dict=True).pooler_output))
    torch.testing.assert_close(features, wanted)
    torch.testing.assert_close(saliency, attention[:, 0, 1:] if save is save_tiny_llava else attention.mean(dim=1))


@pytest.mark.parametrize("images", [PHOTOGRAPHS[:1], PHOTOGRAPHS[1:]], ids=["one", "two"])
def test_answers_are_those_of_transformers(pipeline: Any, reference: Reference, images: list[Path]) -> None:
    for question in QUESTIONS:
        result = pipeline.generate(list(images), question, max_new_tokens=16)
        kept = [selection.token_indices for selection in result.selection]
        expected = reference.generate(images, messages_of(question, len(images)), kept, max_new_tokens=16)
        assert list(result.token_ids) == expected


def test_a_batch_is_answered_one_by_one(pipeline: Any) -> None:
    requests = [([path], question) for path, question in zip(PHOTOGRAPHS, QUESTIONS, strict=True)]
    one_by_one = [pipeline.generate(*request, max_new_tokens=12).token_ids for request in requests]
    assert [row.token_ids for row in pipeline.generate_batch(requests, max_new_tokens=12)] == one_by_one


@torch.no_grad()
def test_the_kept_tokens_are_those_of_the_method(
    siglip_export: ExportResult, tiny_siglip: Path, reference: Reference
) -> None:
    encoder = Llava(reference.model, AutoProcessor.from_pretrained(tiny_siglip)).vision_modules[0].module
    with VisionLanguagePipeline.from_package(siglip_export.output, provider="cpu", num_threads=1) as pipeline:
        for path in PHOTOGRAPHS:
            values = reference.processor.image_processor(images=[Image.open(path)], return_tensors="pt")["pixel_values"]
            features, saliency = encoder(values)
            wanted = select_tokens(features[0].double(), saliency[0].double(), 4)
            selection = pipeline.encode_image(path).selection
            assert selection.token_indices.tolist() == wanted.token_indices.tolist()


@pytest.mark.parametrize("size", [(58, 58), (31, 200), (640, 427), (1, 1), (384, 385)])
def test_images_are_read_as_siglip_reads_them(siglip_export: ExportResult, size: tuple[int, int]) -> None:
    """Resized to a square whatever their shape, and never cropped."""
    noise = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    side = {"height": SIGLIP_IMAGE_SIZE, "width": SIGLIP_IMAGE_SIZE}
    theirs = SiglipImageProcessorPil(size=side)(images=[image], return_tensors="np")["pixel_values"]
    ours = CropPreprocessor.from_file(siglip_export.output / "preprocessor_config.json", **side)(image)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_the_picture_leaves_out_what_fills_no_patch(siglip_export: ExportResult) -> None:
    with VisionLanguagePipeline.from_package(siglip_export.output, provider="cpu") as pipeline:
        selection = pipeline.encode_image(PHOTOGRAPHS[0]).selection
        view = pipeline.encoder.view(PHOTOGRAPHS[0])
    grid = selection.grids[0]
    assert (grid.width, grid.height) == (4 * PATCH_SIZE, 4 * PATCH_SIZE)
    assert view.size == (4 * PATCH_SIZE, 4 * PATCH_SIZE)
    assert draw_kept_tokens(view, selection).width % PATCH_SIZE == 0


def test_half_precision_is_verified(tiny_siglip: Path, tmp_path: Path) -> None:
    """The language model in fp16 is that of LLaVA-NeXT's tests."""
    config = ExportConfig(model=str(tiny_siglip), ratio=0.25, dtype="fp16", vision_only=True, output=tmp_path / "out")
    verification = export_package(config).manifest.verification
    assert verification is not None
    assert verification.passed


def test_a_cls_token_that_is_not_there_cannot_be_left_out(tmp_path: Path) -> None:
    checkpoint = save_tiny_siglip_llava(tmp_path / "checkpoint", vision_feature_select_strategy="default")
    with pytest.raises(UnsupportedModelError, match="= 'default'; expected 'full', because SigLIP has no CLS"):
        export_package(ExportConfig(model=str(checkpoint), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
