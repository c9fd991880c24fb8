"""The exported graphs against transformers, on a tiny random checkpoint of the real architecture."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, Dinov2Config, LlavaConfig, LlavaForConditionalGeneration

from promprune.errors import (
    ConfigError,
    ModelError,
    OutputError,
    PackageError,
    UnsupportedModelError,
    VerificationError,
)
from promprune.export import ExportResult, export_package, verify_package
from promprune.export.checkpoint.loading import load_checkpoint
from promprune.export.config import ExportConfig
from promprune.export.families.llava import Llava
from promprune.export.verify.checks import Limits
from promprune.method.config import SelectionConfig
from promprune.runtime import ImageEncoder, VisionLanguagePipeline
from tests.support.progress import RecordedProgress
from tests.support.tiny_models import IMAGE_SIZE, NUM_TOKENS, save_tiny_llava, tiny_language_model


def session(result: ExportResult, graph: str) -> ort.InferenceSession:
    path = result.output / result.manifest.graphs[graph].file
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def reference(tiny_llava: Path) -> Any:
    return LlavaForConditionalGeneration.from_pretrained(tiny_llava, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def pixel_values() -> torch.Tensor:
    return torch.randn(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


def test_saliency_is_the_attention_that_transformers_reports(
    tiny_llava: Path, reference: Any, pixel_values: torch.Tensor
) -> None:
    with torch.no_grad():
        outputs = reference.model.vision_tower(pixel_values, output_attentions=True)
        _, saliency = Llava(reference, AutoProcessor.from_pretrained(tiny_llava)).vision_modules[0].module(pixel_values)
    layers = reference.config.vision_config.num_hidden_layers
    scored = outputs.attentions[layers + reference.config.vision_feature_layer]
    torch.testing.assert_close(saliency, scored.mean(dim=1)[:, 0, 1:])


def softmaxes(result: ExportResult) -> int:
    model = onnx.load(result.output / "onnx/vision_encoder.onnx", load_external_data=False)
    return sum(node.op_type == "Softmax" for node in model.graph.node)


def test_only_the_layers_that_make_the_features_are_in_the_graph(
    tiny_export: ExportResult, tiny_full_export: ExportResult, reference: Any
) -> None:
    assert reference.config.vision_config.num_hidden_layers == 3
    assert reference.config.vision_feature_layer == -2
    assert softmaxes(tiny_full_export) == 2
    assert softmaxes(tiny_export) == 3  # the score is the third
    model = onnx.load(tiny_export.output / "onnx/vision_encoder.onnx", load_external_data=False)
    assert not any("post_layernorm" in value.name for value in model.graph.initializer)


def test_the_pruned_features_are_rows_of_the_full_ones(
    tiny_export: ExportResult, reference: Any, pixel_values: torch.Tensor
) -> None:
    kept, indices = session(tiny_export, "vision_encoder").run(
        ["image_features", "token_indices"], {"pixel_values": pixel_values.numpy()}
    )
    with torch.no_grad():
        full = torch.stack(list(reference.get_image_features(pixel_values, return_dict=True).pooler_output)).numpy()
    assert kept.shape == (3, 4, full.shape[2])
    assert all(sorted(set(row)) == list(row) for row in indices.tolist())  # distinct, in spatial order
    np.testing.assert_allclose(kept, np.take_along_axis(full, indices[:, :, None], axis=1), rtol=1e-4, atol=1e-4)


def test_the_baseline_keeps_everything_and_scores_nothing(
    tiny_full_export: ExportResult, reference: Any, pixel_values: torch.Tensor
) -> None:
    graph = session(tiny_full_export, "vision_encoder")
    assert [output.name for output in graph.get_outputs()] == ["image_features"]
    with torch.no_grad():
        full = torch.stack(list(reference.get_image_features(pixel_values, return_dict=True).pooler_output)).numpy()
    np.testing.assert_allclose(graph.run(None, {"pixel_values": pixel_values.numpy()})[0], full, rtol=1e-4, atol=1e-4)


def test_only_standard_operators_are_used(tiny_export: ExportResult) -> None:
    for record in tiny_export.manifest.graphs.values():
        model = onnx.load(tiny_export.output / record.file, load_external_data=False)
        assert {opset.domain for opset in model.opset_import} <= {""}, record.file
        assert not model.functions, record.file
        assert {node.domain for node in model.graph.node} == {""}, record.file


@pytest.mark.parametrize(("past", "length", "padding"), [(0, 5, 0), (0, 1, 0), (0, 6, 3), (7, 1, 0), (4, 3, 2)])
def test_the_decoder_equals_transformers(
    tiny_export: ExportResult, reference: Any, past: int, length: int, padding: int
) -> None:
    """One row of full length and one left-padded, the first ``past`` positions cached."""
    total = past + length
    input_ids = torch.randint(4, 260, (2, total), generator=torch.Generator().manual_seed(total))
    attention_mask = torch.ones(2, total, dtype=torch.int64)
    attention_mask[1, :padding] = 0
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = reference(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids).logits[:, -1]
        embeds = reference.get_input_embeddings()(input_ids).numpy()
    decoder = session(tiny_export, "decoder_model_merged")
    caches = [value.name for value in decoder.get_inputs() if value.name.startswith("past_key_values.")]
    cache = {name: np.zeros((2, 2, 0, 8), np.float32) for name in caches}
    for begin, end in ((0, past), (past, total)) if past else ((0, total),):
        logits, *present = decoder.run(
            None,
            {
                "inputs_embeds": embeds[:, begin:end],
                "attention_mask": attention_mask[:, :end].numpy(),
                "position_ids": position_ids[:, begin:end].numpy(),
                **cache,
            },
        )
        cache = dict(zip(caches, present, strict=True))
    np.testing.assert_allclose(logits[:, 0], want.numpy(), rtol=1e-4, atol=1e-4)


def test_the_manifest_says_what_is_kept(tiny_export: ExportResult) -> None:
    counts, selection = tiny_export.manifest.tokens_of(), tiny_export.manifest.selection
    assert (counts.num_tokens, counts.keep_tokens, counts.ratio) == (NUM_TOKENS, 4, 0.25)
    assert (selection.requested_ratio, selection.config) == (0.25, SelectionConfig())
    verification = tiny_export.manifest.verification
    assert verification is not None
    assert verification.passed
    assert len(verification.checks) >= 10


def test_the_split_selector_chooses_as_the_fused_graph(tiny_export: ExportResult, pixel_values: torch.Tensor) -> None:
    inner = onnx.load(tiny_export.output / "onnx/vision_encoder.onnx")
    for name in ("encoder/image_features", "encoder/saliency"):
        inner.graph.output.append(onnx.ValueInfoProto(name=name))
    fused = ort.InferenceSession(inner.SerializeToString(), providers=["CPUExecutionProvider"])
    names = ["encoder/image_features", "encoder/saliency", "token_indices"]
    features, saliency, indices = fused.run(names, {"pixel_values": pixel_values.numpy()})
    split = session(tiny_export, "token_selector")
    got = split.run(["token_indices"], {"image_features": features, "saliency": saliency})[0]
    np.testing.assert_array_equal(got, indices)


def test_a_fp16_export_verifies(tiny_llava: Path, tmp_path: Path) -> None:
    result = export_package(
        ExportConfig(model=str(tiny_llava), keep_tokens=5, dtype="fp16", vision_only=True, output=tmp_path / "out")
    )
    assert result.manifest.tokens_of().keep_tokens == 5
    assert result.manifest.selection.requested_ratio is None
    outputs = {value.name: value.dtype for value in result.manifest.graphs["vision_encoder"].outputs}
    assert outputs["image_features"] == "float16"
    assert outputs["spectral_entropy"] == "float32"
    model = onnx.load(result.output / "onnx/vision_encoder.onnx", load_external_data=False)
    casts = [node for node in model.graph.node if node.op_type == "Cast" and node.name.startswith("selector/")]
    assert any(attribute.i == onnx.TensorProto.FLOAT for node in casts for attribute in node.attribute)


def test_verification_notices_other_weights(tiny_export: ExportResult, tmp_path: Path) -> None:
    other = load_checkpoint(str(save_tiny_llava(tmp_path / "other", seed=1)))
    record = verify_package(tiny_export.package, other, num_images=2)
    failed = {check.name for check in record.checks if not check.passed}
    assert not record.passed
    assert {"image features, relative error", "prefill logits, relative error"} <= failed
    assert "kept sets equal to the float64 method's" not in failed  # that depends on the graph alone


def test_a_failed_verification_leaves_nothing(
    tiny_llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"fp32": Limits(relative_error=0.0, identical_sets=1.0, overlap=1.0, equal_answers=1.0)}
    monkeypatch.setattr("promprune.export.verify.verification.LIMITS", limits)
    with pytest.raises(VerificationError) as caught:
        export_package(ExportConfig(model=str(tiny_llava), ratio=0.25, vision_only=True, output=tmp_path / "out"))
    assert any(not check.passed for check in caught.value.checks)
    assert list(tmp_path.iterdir()) == []


def test_ratio_and_count_settle_t() -> None:
    assert ExportConfig(ratio=0.12).token_counts(576).keep_tokens == 69
    assert ExportConfig(ratio=0.12).token_counts(256).keep_tokens == 31
    assert ExportConfig(ratio=0.5).token_counts(5).keep_tokens == 2  # half to even
    assert ExportConfig(ratio=0.001).token_counts(16).keep_tokens == 1
    assert ExportConfig(ratio=1.0).token_counts(576).keep_tokens == 576
    assert ExportConfig(keep_tokens=64, ratio=0.5).token_counts(576).keep_tokens == 64
    with pytest.raises(ConfigError, match="received keep_tokens = 577; expected 1 to 576"):
        ExportConfig(keep_tokens=577).token_counts(576)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-2, 9]}, "tower of 3 layers"),
        ({"vision_feature_layer": 9}, "tower of 3 layers"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy = 'full'"),
    ],
)
def test_what_is_not_exported_is_refused_with_the_reason(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    checkpoint = save_tiny_llava(tmp_path / "checkpoint", **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        export_package(ExportConfig(model=str(checkpoint), output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tower_that_is_not_exported_is_refused_with_the_reason(tmp_path: Path) -> None:
    tower = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)
    config = LlavaConfig(vision_config=tower, text_config=tiny_language_model(), image_token_id=3)
    checkpoint = save_tiny_llava(tmp_path / "checkpoint")
    LlavaForConditionalGeneration(config).save_pretrained(checkpoint)
    with pytest.raises(UnsupportedModelError, match="a 'dinov2' vision tower; expected 'clip_vision_model' or 'siglip"):
        export_package(ExportConfig(model=str(checkpoint), output=tmp_path / "out"))


def test_an_incomplete_checkpoint_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors[next(name for name in tensors if "vision_tower" in name)]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"no weights for 1 tensors, .*vision_tower"):
        load_checkpoint(str(checkpoint))
    (checkpoint / "model.safetensors").write_bytes(b"\x08")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_checkpoint(str(checkpoint))
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors weights"):
        load_checkpoint(str(checkpoint))


def test_an_existing_output_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="already exists"):
        export_package(ExportConfig(model="no/such-model", output=tmp_path))


def test_a_models_own_constants_are_used_unless_overridden(tiny_llava: Path, tmp_path: Path) -> None:
    from promprune.export.checkpoint.loading import read_constants

    checkpoint = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint"))
    assert ExportConfig().parameters_from(read_constants(checkpoint)) == "defaults"
    (checkpoint / "promprune_config.json").write_text('{"mu": 0.25, "tau": 0.01}')
    constants = read_constants(checkpoint)
    assert ExportConfig().selection(constants) == SelectionConfig(mu=0.25, tau=0.01)
    assert ExportConfig().parameters_from(constants) == "model"
    assert ExportConfig(mu=0.3).selection(constants) == SelectionConfig(mu=0.3, tau=0.01)
    assert ExportConfig(mu=0.3).parameters_from(constants) == "command line"
    (checkpoint / "promprune_config.json").write_text('{"mu": "high"}')
    with pytest.raises(ModelError, match="cannot be read"):
        read_constants(checkpoint)


def test_a_vision_only_package_encodes_and_does_not_answer(tiny_llava: Path, tmp_path: Path) -> None:
    config = ExportConfig(model=str(tiny_llava), ratio=0.25, vision_only=True, output=tmp_path / "out")
    progress = RecordedProgress()
    result = export_package(config, progress=progress)
    assert progress.steps == [
        "read the checkpoint",
        "export vision_encoder",
        "write tokenizer and configuration",
        "verify against the model",
    ]
    assert progress.announced == progress.finished == 4
    assert result.manifest.verification is not None
    assert result.manifest.verification.passed
    assert set(result.manifest.graphs) == {"vision_encoder"}
    assert not list(result.output.glob("onnx/decoder*"))
    with ImageEncoder.from_package(result.output) as encoder:
        assert encoder.encode_image(Image.new("RGB", (70, 60), "teal")).image_features.shape == (4, 48)
    with pytest.raises(PackageError, match="exported with --vision-only"):
        VisionLanguagePipeline.from_package(result.output)


def test_a_preprocessing_of_another_size_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(tiny_llava, tmp_path / "checkpoint"))
    config = (checkpoint / "processor_config.json").read_text()
    (checkpoint / "processor_config.json").write_text(config.replace("56", "42"))
    with pytest.raises(UnsupportedModelError, match="images of 42 x 42 pixels; expected 56 x 56"):
        export_package(ExportConfig(model=str(checkpoint), output=tmp_path / "out"))


def test_without_a_chat_template_the_prompt_is_that_of_llava(tmp_path: Path) -> None:
    checkpoint = save_tiny_llava(tmp_path / "checkpoint", tie_word_embeddings=True)
    (checkpoint / "chat_template.jinja").unlink()
    result = export_package(ExportConfig(model=str(checkpoint), ratio=0.25, output=tmp_path / "out"))
    assert not (result.output / "chat_template.jinja").exists()
    assert result.manifest.verification is not None
    assert result.manifest.verification.passed
