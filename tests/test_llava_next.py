"""LLaVA-NeXT packages against transformers: inputs of the language model, logits, answers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from promprune.errors import BackendError, ConfigError, PackageError, PromptError, UnsupportedModelError
from promprune.export import ExportResult, export_package
from promprune.export.config import ExportConfig
from promprune.export.engine import profiles_of
from promprune.method.config import SelectionConfig
from promprune.method.reference import select_tokens
from promprune.package.describe import describe_selection
from promprune.package.engines import EngineConfig
from promprune.package.image import IMAGE_NEWLINE_FILE
from promprune.package.manifest import read_manifest, write_manifest
from promprune.package.package import Package
from promprune.runtime import EncodedImage, VisionLanguagePipeline, draw_kept_tokens, image_embeds_part
from promprune.runtime.images import open_processor
from tests.support.crops import SIZES, assert_close, picture, prefill
from tests.support.tiny_models import IMAGE_SIZE, save_tiny_llava_next, tiny_language_model


class Reference:
    """A checkpoint in transformers, attention computed eagerly so that it can be seen."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        model = LlavaNextForConditionalGeneration.from_pretrained(folder, attn_implementation="eager", dtype=dtype)
        self.model = model.eval()

    def text(self, question: str, num_images: int) -> str:
        content = [*[{"type": "image"}] * num_images, {"type": "text", "text": question}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    @torch.no_grad()
    def whole(self, images: list[Image.Image], question: str) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs_embeds [length, D] and logits [V] of transformers' own path."""
        inputs = self.processor(images=images or None, text=self.text(question, len(images)), return_tensors="pt")
        if images:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        seen: list[torch.Tensor] = []
        hook = self.model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        logits = self.model(**inputs).logits
        hook.remove()
        return seen[0][0].float().numpy(), logits[0, -1].float().numpy()

    @torch.no_grad()
    def pruned(self, images: list[Image.Image], question: str, keep_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """The same with the tokens that the method in float64 chooses, crop by crop, in raster order of the image."""
        kept = [self.kept(image, keep_tokens) for image in images]
        pieces = self.text(question, len(images)).split("<image>")
        tokenizer = self.processor.tokenizer
        embed = self.model.get_input_embeddings()
        parts = [embed(torch.tensor(tokenizer(pieces[0]).input_ids))]
        for features, piece in zip(kept, pieces[1:], strict=True):
            parts += [features, embed(torch.tensor(tokenizer(piece, add_special_tokens=False).input_ids))]
        embeds = torch.cat(parts)[None]
        logits = self.model(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64)).logits
        return embeds[0].float().numpy(), logits[0, -1].float().numpy()

    def kept(self, image: Image.Image, keep_tokens: int) -> torch.Tensor:
        config, inputs = self.model.config, self.processor.image_processor(images=[image], return_tensors="pt")
        pixel_values = inputs["pixel_values"][0].to(self.model.dtype)
        tower = self.model.model.vision_tower(pixel_values, output_attentions=True, output_hidden_states=True)
        features = self.model.model.multi_modal_projector(tower.hidden_states[config.vision_feature_layer][:, 1:])
        scored = tower.attentions[config.vision_config.num_hidden_layers + config.vision_feature_layer]
        saliency = scored.float().mean(dim=1)[:, 0, 1:]
        crops, tokens = saliency.shape
        # The image's tokens in their order, as numbers of crop and token: transformers' unpadding of these numbers.
        shape = get_anyres_image_grid_shape((image.height, image.width), config.image_grid_pinpoints, IMAGE_SIZE)
        numbers = torch.arange(tokens, crops * tokens).view(*shape, 4, 4, 1).permute(4, 0, 2, 1, 3)
        unpadded = unpad_image(numbers.flatten(1, 2).flatten(2, 3), (image.height, image.width)).flatten()
        order = torch.cat([torch.arange(tokens), unpadded])
        mask = torch.zeros(crops * tokens, dtype=torch.bool).index_fill(0, order, True).view(crops, tokens)
        chosen = torch.zeros_like(mask)
        for crop in mask.any(dim=1).nonzero()[:, 0]:
            picks = select_tokens(
                features[crop].double(), saliency[crop].double(), keep_tokens, SelectionConfig(), mask[crop]
            )
            chosen[crop, picks.token_indices] = True
        return features.flatten(0, 1)[order[chosen.flatten()[order]]]


@pytest.fixture(scope="module")
def reference(tiny_llava_next: Path) -> Reference:
    return Reference(tiny_llava_next)


@pytest.fixture(scope="module")
def full(next_full_export: ExportResult) -> Any:
    with VisionLanguagePipeline.from_package(next_full_export.output, provider="cpu", num_threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def pruned(next_export: ExportResult) -> Any:
    with VisionLanguagePipeline.from_package(next_export.output, provider="cpu", num_threads=1) as loaded:
        yield loaded


# Nothing removed: transformers' own inputs


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_with_nothing_removed_the_language_model_gets_transformers_inputs(
    full: Any, reference: Reference, size: tuple[int, int]
) -> None:
    image = picture(size)
    embeds, _, logits = prefill(full, [([image], "What is it?")])
    expected, expected_logits = reference.whole([image], "What is it?")
    assert_close(embeds[0], expected, "fp32")
    assert_close(logits[0], expected_logits, "fp32")


BATCH = [
    ([picture((120, 40))], "What is it?"),
    ([picture((64, 64), 1), picture((30, 90), 2)], "Which of the two is larger, the first or the second?"),
    ([], "No image"),
]


def test_batches_and_several_images_with_nothing_removed(full: Any, reference: Reference) -> None:
    embeds, mask, logits = prefill(full, BATCH)
    for row, (images, question) in enumerate(BATCH):
        expected, expected_logits = reference.whole(images, question)
        assert_close(embeds[row, -len(expected) :], expected, "fp32")
        assert mask[row].sum() == len(expected)
        assert_close(logits[row], expected_logits, "fp32")


def test_answers_with_nothing_removed_are_generates(full: Any, reference: Reference) -> None:
    for images, question in BATCH:
        inputs = reference.processor(
            images=images or None, text=reference.text(question, len(images)), return_tensors="pt"
        )
        expected = reference.model.generate(**inputs, max_new_tokens=12, do_sample=False)
        result = full.generate(images, question, max_new_tokens=12)
        assert list(result.token_ids) == expected[0, inputs["input_ids"].shape[1] :].tolist()


# Pruned: transformers, fed with the choice of the method in float64


# The whole crop of one pixel is blank: nothing but rounding tells its tokens apart.
@pytest.mark.parametrize("size", [size for size in SIZES if size != (1, 1)], ids=str)
def test_pruned_inputs_are_the_tokens_that_the_method_chooses(
    pruned: Any, reference: Reference, size: tuple[int, int]
) -> None:
    image = picture(size)
    embeds, _, logits = prefill(pruned, [([image], "What is it?")])
    keep_tokens = pruned.manifest.tokens_of().keep_tokens
    expected, expected_logits = reference.pruned([image], "What is it?", keep_tokens)
    assert_close(embeds[0], expected, "fp32")
    assert_close(logits[0], expected_logits, "fp32")


def test_pruned_batches_streams_chats_and_several_images(pruned: Any, reference: Reference) -> None:
    embeds, _, logits = prefill(pruned, BATCH)
    for row, (images, question) in enumerate(BATCH):
        expected, expected_logits = reference.pruned(images, question, pruned.manifest.tokens_of().keep_tokens)
        assert_close(embeds[row, -len(expected) :], expected, "fp32")
        assert_close(logits[row], expected_logits, "fp32")
    one_by_one = [pruned.generate(*request, max_new_tokens=10).token_ids for request in BATCH]
    assert [row.token_ids for row in pruned.generate_batch(BATCH, max_new_tokens=10)] == one_by_one
    assert [pruned.stream(*request, max_new_tokens=10).result.token_ids for request in BATCH] == one_by_one
    chat = pruned.chat()
    chat.ask("What is it?", BATCH[0][0], max_new_tokens=4)
    again = chat.ask("And these?", BATCH[1][0], max_new_tokens=4)
    images = [*BATCH[0][0], *BATCH[1][0]]
    assert again.token_ids == pruned.generate(images, chat.messages[:-1], max_new_tokens=4).token_ids
    assert again.timings.reused_tokens > 20


def test_every_crop_gives_its_tokens_and_padding_none(pruned: Any) -> None:
    selection = pruned.encode_image(picture((112, 60))).selection
    assert [(grid.rows, grid.columns) for grid in selection.grids] == [(4, 4), (4, 8)]
    assert selection.num_tokens == 16 + 32
    keep = pruned.manifest.tokens_of().keep_tokens
    assert selection.keep_tokens == 5 * keep  # 2 x 2 crops of 8 x 4 tokens without the padding, and the whole
    assert len(selection.spectral_entropies) == 5
    assert sorted(set(selection.token_indices.tolist())) == selection.token_indices.tolist()
    # A crop with fewer tokens than T gives those; one with none is not run.
    narrow = pruned.encoder.preprocess(picture((8, 100)))
    assert len(narrow.feeds["pixel_values"]) < 4
    sums = narrow.feeds["token_mask"].sum(axis=1)
    assert (
        narrow.num_placeholders
        == np.minimum(sums, keep).sum()
        == len(pruned.encode_image(picture((8, 100))).image_features)
    )


def test_padding_that_is_chosen_is_noticed(pruned: Any) -> None:
    processor, image = pruned.encoder.processor, pruned.encoder.preprocess(picture((112, 60)))
    outputs = {k: v.copy() for k, v in pruned.encoder.sessions["vision_encoder"].run(image.feeds).items()}
    padding = np.flatnonzero(image.token_indices[1] < 0)
    outputs["token_indices"][1] = padding[: outputs["token_indices"].shape[1]]
    with pytest.raises(BackendError, match="not padding"):
        processor.postprocess(outputs, image)


def test_the_selection_order_goes_crop_by_crop(next_export: ExportResult, tmp_path: Path) -> None:
    """The order is also applied after the graph, so that a manifest with the other order reveals it."""
    folder = Path(shutil.copytree(next_export.output, tmp_path / "package"))
    manifest = read_manifest(folder)
    config = replace(manifest.selection.config, order="selection")
    selection = msgspec.structs.replace(manifest.selection, config=config)
    write_manifest(folder, msgspec.structs.replace(manifest, selection=selection))
    with VisionLanguagePipeline.from_package(folder, provider="cpu") as other:
        image = other.encoder.preprocess(picture((112, 112)))
        outputs = other.encoder.sessions["vision_encoder"].run(image.feeds)
        selection = other.encode_image(picture((112, 112))).selection
    rows = [image.token_indices[row][indices] for row, indices in enumerate(outputs["token_indices"])]
    np.testing.assert_array_equal(selection.token_indices, np.concatenate(rows))


def test_a_context_that_does_not_fit_is_refused_before_anything_runs(
    full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(full.encoder), "encode", lambda *_: pytest.fail("it ran"))
    with pytest.raises(PromptError, match=r"1\d\d\d tokens long.*at most 1024"):
        full.generate([picture((112, 112))] * 12, "What?")


def test_an_encoded_image_serves_again_and_elsewhere(pruned: Any, full: Any) -> None:
    for pipeline in (pruned, full):
        image = picture((90, 110))
        encoded = pipeline.encode_image(image)
        assert len(image_embeds_part(encoded)["image_embeds"]) > 100
        assert pipeline.generate(encoded, "x", max_new_tokens=4).token_ids == (
            pipeline.generate(image, "x", max_new_tokens=4).token_ids
        )
        wrong = EncodedImage(encoded.image_features[:-1], encoded.selection)
        with pytest.raises(ConfigError, match="expected"):
            pipeline.generate(wrong, "x")


def test_the_picture_shows_the_whole_and_the_crops(pruned: Any, full: Any) -> None:
    for size in [*SIZES, (400, 300)]:
        image = picture(size)
        for pipeline in (pruned, full):
            selection = pipeline.encode_image(image).selection
            view = pipeline.encoder.view(image)
            assert view.height >= IMAGE_SIZE
            drawn = draw_kept_tokens(view, selection)
            assert drawn.width % view.width == 0
        written = json.loads(json.dumps(selection.to_dict()))
        assert sum(grid["rows"] * grid["columns"] for grid in written["grids"]) == selection.num_tokens


# Other language models, precisions, and what is refused


def test_a_sliding_window(tiny_mistral: Path, mistral_export: ExportResult) -> None:
    check_against_transformers(mistral_export, tiny_mistral, "fp32")


def test_tied_embeddings_in_half_precision(tmp_path: Path) -> None:
    text = tiny_language_model("qwen2", tie_word_embeddings=True)
    folder = save_tiny_llava_next(tmp_path / "checkpoint", text=text, tie_word_embeddings=True)
    result = export_package(ExportConfig(model=str(folder), ratio=0.12, dtype="fp16", output=tmp_path / "out"))
    check_against_transformers(result, folder, "fp16")


def check_against_transformers(result: ExportResult, folder: Path, dtype: Any) -> None:
    assert result.manifest.verification is not None
    assert result.manifest.verification.passed
    reference = Reference(folder)
    with VisionLanguagePipeline.from_package(result.output, provider="cpu", num_threads=1) as pipeline:
        _, _, logits = prefill(pipeline, BATCH)
    for row, (images, question) in enumerate(BATCH):
        assert_close(logits[row], reference.pruned(images, question, 2)[1], dtype)


@pytest.mark.slow
def test_half_precision_with_nothing_removed(tiny_llava_next: Path, reference: Reference, tmp_path: Path) -> None:
    config = ExportConfig(model=str(tiny_llava_next), ratio=1.0, dtype="fp16", output=tmp_path / "out")
    result = export_package(config)
    assert describe_selection(result.manifest) == "keeps all 16 visual tokens of each crop (the unpruned baseline)"
    with VisionLanguagePipeline.from_package(result.output, provider="cpu", num_threads=1) as pipeline:
        embeds, _, logits = prefill(pipeline, BATCH)
    for row, (images, question) in enumerate(BATCH):
        expected, expected_logits = reference.whole(images, question)
        assert_close(embeds[row, -len(expected) :], expected, "fp16")
        assert_close(logits[row], expected_logits, "fp16")


@pytest.mark.slow
def test_bf16_is_verified(tiny_llava_next: Path, tmp_path: Path) -> None:
    """Computed in fp32 with the weights in bf16; unpruned and pruned, with padded crops."""
    for ratio in (1.0, 0.12):
        config = ExportConfig(model=str(tiny_llava_next), ratio=ratio, dtype="bf16", output=tmp_path / f"{ratio}")
        verification = export_package(config).manifest.verification
        assert verification is not None
        assert verification.passed
        assert {"image features, relative error", "decode logits, relative error"} <= {
            c.name for c in verification.checks
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_grid_pinpoints": [[56, 112], [56, 100]]}, r"\[56, 100\] among its image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[56, 112]]}, "image_grid_pinpoints = .*as in its config.json"),
        ({"image_grid_pinpoints": [], "preprocessor": {"image_grid_pinpoints": []}}, "at least one"),
        ({"preprocessor": {"crop_size": {"height": 42, "width": 42}}}, "crops of 42 x 42 pixels; expected 56 x 56"),
        ({"vision_feature_layer": [-2, 9]}, "tower of 3 layers"),
        ({"vision_feature_select_strategy": "full"}, "CLS"),
    ],
)
def test_what_is_not_exported_is_refused_with_the_reason(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    checkpoint = save_tiny_llava_next(tmp_path / "checkpoint", **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        export_package(ExportConfig(model=str(checkpoint), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_package_without_its_newline_is_refused(next_full_export: ExportResult, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(next_full_export.output, tmp_path / "package"))
    manifest = read_manifest(folder)
    for content in (b"", b"no array", np.float32(1).tobytes()):
        (folder / IMAGE_NEWLINE_FILE).write_bytes(content)
        with pytest.raises(PackageError, match=IMAGE_NEWLINE_FILE):
            open_processor(Package(folder, manifest))
        with pytest.raises(PackageError, match=IMAGE_NEWLINE_FILE):
            VisionLanguagePipeline.from_package(folder)
    np.save(folder / IMAGE_NEWLINE_FILE, np.zeros(48))
    with pytest.raises(PackageError, match="float64"):
        open_processor(Package(folder, manifest))


def test_engines_are_for_all_crops_of_an_image(next_export: ExportResult, next_full_export: ExportResult) -> None:
    """That they build is tested with those of all families."""
    (profile,) = profiles_of("vision_encoder", next_export.manifest, EngineConfig(max_batch=2))
    assert profile.shapes["pixel_values"].max == (10, 3, 56, 56)  # two images of five crops
    assert profile.shapes["token_mask"].opt == (5, 16)
    for result, image_tokens in ((next_export, 5 * 2), (next_full_export, 16 + 8 * 9)):
        (profile,) = profiles_of("decoder_model_merged", result.manifest, EngineConfig(max_prompt_tokens=100))
        assert profile.shapes["inputs_embeds"].max == (1, image_tokens + 100, 48)
